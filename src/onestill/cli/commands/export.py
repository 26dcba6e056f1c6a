"""`onestill export`: a model in another form."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from onestill.cli.options import AdditionOptions, Model, with_groups
from onestill.errors import OnestillError, OutputError, near, require

FORMS = ("openvino",)


@with_groups
def export(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="A new folder for the result.")],
    *,
    model: Model = "icons",
    to: Annotated[str, typer.Option(metavar="FORM", help="The form to make; openvino is the only one.")] = "openvino",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Weights of SD and SDXL: float16, or int8 at half the size. (default: float16)"
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="Measure int8 for a small model too, and use it where pictures stay close; takes minutes."
        ),
    ] = False,
    additions: AdditionOptions,
) -> None:
    """Copy a model and give the copy the form that an engine runs. Needs the extra `torch`."""
    if to not in FORMS:
        raise OnestillError(f"There is no form '{to}'; choose from {', '.join(FORMS)}.{near(to, FORMS)}")
    if os.path.lexists(out):
        raise OutputError(f"'{out}' exists; give the name of a new folder.")
    for package in ("torch", "diffusers", "transformers"):
        require(package, "torch")
    from onestill.checkpoint import MANIFEST, Additions, describe, read_json, resolve, verify

    added = Additions.of(**additions.arguments())
    folder = resolve(model)
    info = describe(folder, added)
    verify(folder, contents=True)
    if info.size_multiple:
        if int8:
            raise OnestillError("Models of this kind take int8 weights by --weights int8; leave out --int8.")
        from onestill.export.folder import folder_written_whole
        from onestill.export.stored_weights import export_sd

        with folder_written_whole(out, force=False) as unfinished:
            export_sd(info, unfinished, weights=weights or "float16")
        print(out)
        return
    if weights is not None or added != Additions():
        raise OnestillError(f"The model '{info.name}' is exported as it is; leave out --weights and what goes on top.")
    from onestill.engine.openvino.shared_weights import has_int8
    from onestill.export.folder import folder_written_whole, write_manifest
    from onestill.export.shared_weights import export_openvino

    with folder_written_whole(out, force=False) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        export_openvino(copy, int8=int8 or has_int8(folder))
        if (copy / MANIFEST).is_file():
            facts = read_json(copy, MANIFEST)
            write_manifest(copy, **{name: facts[name] for name in facts if name not in ("files", "format", "onestill")})
    print(out)
