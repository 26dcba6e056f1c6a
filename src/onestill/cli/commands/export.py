"""`onestill export`: a model in another form."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestill.cli.options import Loras, Model, Preset, Schedule, TinyVae, Unet, parse_loras
from onestill.errors import OnestillError, OutputError, near, require

if TYPE_CHECKING:
    from onestill.checkpoint import ModelInfo

__all__ = ["export"]

FORMS = ("openvino",)
WEIGHTS = ("float16", "int8")


def export(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="A new folder for the result.")],
    model: Model = "icons",
    to: Annotated[
        str, typer.Option("--to", metavar="FORM", help="The form to make; openvino is the only one.")
    ] = "openvino",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="TYPE",
            help="Weights of SD and SDXL: float16, or int8 at half the size. (default: float16)",
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="Measure int8 for a small model too, and use it where pictures stay close; takes minutes."
        ),
    ] = False,
    unet: Unet = None,
    lora: Loras = None,
    tiny_vae: TinyVae = None,
    preset: Preset = None,
    schedule: Schedule = None,
) -> None:
    """Copy a model and give the copy the form that an engine runs. Needs the extra `torch`."""
    if to not in FORMS:
        raise OnestillError(f"There is no form '{to}'; choose from {', '.join(FORMS)}.{near(to, FORMS)}")
    if os.path.lexists(out):
        raise OutputError(f"'{out}' exists; give the name of a new folder.")
    for package in ("torch", "diffusers", "transformers"):
        require(package, "torch")
    from onestill.checkpoint import MANIFEST, Additions, Lora, describe, read_json, resolve, verify

    loras = tuple(Lora(path, scale) for path, scale in parse_loras(lora).items())
    additions = Additions(unet=unet, loras=loras, tiny_vae=tiny_vae, preset=preset, schedule=schedule)
    folder = resolve(model)
    info = describe(folder, additions)
    verify(folder, contents=True)
    if info.size_multiple:
        if int8:
            raise OnestillError("Models of this kind take int8 weights by --weights int8; leave out --int8.")
        export_large(info, out, weights or WEIGHTS[0])
        return
    if weights is not None or additions != Additions():
        raise OnestillError(f"The model '{info.name}' is exported as it is; leave out --weights and what goes on top.")
    from onestill.engine.openvino.shared_weights import has_int8
    from onestill.export.folder import write_manifest
    from onestill.export.shared_weights import export_openvino

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        # Beside the result, so that it appears whole by a rename, or not at all.
        copy = Path(scratch) / out.name
        shutil.copytree(folder, copy)
        export_openvino(copy, int8=int8 or has_int8(folder))
        if (copy / MANIFEST).is_file():
            facts = read_json(copy, MANIFEST)
            write_manifest(copy, **{name: facts[name] for name in facts if name not in ("files", "format", "onestill")})
        copy.rename(out)
    print(out)


def export_large(info: ModelInfo, out: Path, weights: str) -> None:
    """Write a model of Stable Diffusion's families in OpenVINO's form as the new folder `out`, whole or not at all."""
    from onestill.export.stored_weights import export_sd

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        export_sd(info, Path(scratch) / out.name, weights=weights).rename(out)
    print(out)
