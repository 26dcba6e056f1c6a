"""`onestill export`: a model in another form."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from onestill.cli.options import Model
from onestill.errors import OnestillError, OutputError, near, require

__all__ = ["export"]

FORMS = ("openvino",)


def export(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="A new folder for the result.")],
    model: Model = "icons",
    to: Annotated[str, typer.Option("--to", metavar="FORM", help="The form to make: openvino.")] = "openvino",
) -> None:
    """Copy a model and give the copy the form that an engine runs. Needs the extra `torch`."""
    if to not in FORMS:
        raise OnestillError(f"There is no form '{to}'; choose from {', '.join(FORMS)}.{near(to, FORMS)}")
    if os.path.lexists(out):
        raise OutputError(f"'{out}' exists; give the name of a new folder.")
    for package in ("torch", "diffusers", "transformers"):
        require(package, "torch")
    from onestill.checkpoint import MANIFEST, read_json, resolve, verify
    from onestill.engine.export import export_openvino, write_manifest

    folder = resolve(model)
    verify(folder, contents=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        # Beside the result, so that it appears whole by a rename, or not at all.
        copy = Path(scratch) / out.name
        shutil.copytree(folder, copy)
        export_openvino(copy)
        if (copy / MANIFEST).is_file():
            facts = read_json(copy, MANIFEST)
            write_manifest(copy, **{name: facts[name] for name in facts.keys() - {"files", "format", "onestill"}})
        copy.rename(out)
    print(out)
