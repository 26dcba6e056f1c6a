"""Options that several commands share, and the reading of what people type into them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestill.errors import OnestillError, SizeError

if TYPE_CHECKING:
    from onestill.engine.protocol import TorchOptions

__all__ = [
    "Compile",
    "Database",
    "Device",
    "Dtype",
    "Engine",
    "Json",
    "KeysFile",
    "Loras",
    "Model",
    "Preset",
    "Quantize",
    "Schedule",
    "TinyVae",
    "Unet",
    "parse_daily",
    "parse_loras",
    "parse_size",
    "torch_options",
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|PATH|ID",
        help="A shipped model, a folder in diffusers' format, a .safetensors file, or a Hub id.",
    ),
]
Unet = Annotated[
    Path | None,
    typer.Option(
        "--unet", metavar="PATH", help="A folder or file with a UNet that replaces the model's. (default: none)"
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="FILE[:SCALE]", help="A LoRA file and its scale. May be repeated. (default scale: 1)"
    ),
]
TinyVae = Annotated[
    Path | None,
    typer.Option(
        "--tiny-vae", metavar="PATH", help="A tiny decoder: TAESD, or TAESDXL for SDXL. (default: the model's VAE)"
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="How to draw where the files do not say: turbo, lightning, lcm, dmd2, base. (default: by the files)",
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="NAME",
        help="What the network's output means: eps, v, v-zsnr, x0, edm, edm-v. (default: by the files)",
    ),
]
Compile = Annotated[
    str | None,
    typer.Option(
        "--compile",
        metavar="HOW",
        help="What torch compiles: regional (about a minute) or whole (minutes). (default: nothing)",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="TYPE",
        help="Store the UNet's large layers in int8 or fp8, with torchao. (default: neither)",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="What runs the model: openvino or torch. (default: auto, openvino where the model has that form)",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where torch runs it: cpu, cuda, cuda:1, mps. (default: auto, a GPU where torch has one)",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="What it computes in: float32, bfloat16, float16, int8. (default: the fastest on this machine)",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        envvar="ONESTILL_DATABASE",  # a password in a command line is there for all to see
        help="The database of keys, counts and the gallery. (default: SQLite in the user's data folder)",
    ),
]
KeysFile = Annotated[
    Path | None, typer.Option("--keys", metavar="FILE", help="A file of hashed keys that may draw. (default: none)")
]


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """(height, width) in pixels from `256x128`, which is width x height, or from `256`; (None, None) from None.

    Raises:
        SizeError: the text is neither.
    """
    if text is None:
        return None, None
    match = re.fullmatch(r"\s*(\d{1,6})(?:\s*[xX×]\s*(\d{1,6}))?\s*", text)  # noqa: RUF001 (people paste that sign)
    if match is None:
        raise SizeError(f"The size '{text}' is not understood; write it as WIDTHxHEIGHT in pixels, such as 256x256.")
    width = int(match[1])
    return int(match[2] or width), width


def parse_daily(text: str | None) -> int | None:
    """Pictures a day from `50/day` or `50`; None from None.

    Raises:
        OnestillError: the text is neither.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,9})\s*(/\s*day)?\s*", text)
    if match is None:
        raise OnestillError(f"The limit '{text}' is not understood; write it as pictures a day, such as 200/day.")
    return int(match[1])


def parse_loras(texts: list[str] | None) -> dict[Path, float]:
    """LoRA files and what each is multiplied by, from `file.safetensors` or `file.safetensors:0.7`; twice adds up.

    Raises:
        OnestillError: what follows the colon is no number.
    """
    found: dict[Path, float] = {}
    for text in texts or []:
        path, colon, scale = text.rpartition(":") if not Path(text).exists() else (text, "", "")
        if colon and not re.fullmatch(r"-?\d*\.?\d+", scale):
            raise OnestillError(f"The LoRA '{text}' is not understood; write it as FILE or FILE:SCALE, such as x:0.7.")
        file = Path(path if colon else text)
        found[file] = found.get(file, 0.0) + (float(scale) if colon else 1.0)
    return found


def torch_options(compiling: str | None, quantizing: str | None) -> TorchOptions | None:
    """How torch computes; None where nothing was asked for."""
    if compiling is None and quantizing is None:
        return None
    from onestill.engine.protocol import TorchOptions

    return TorchOptions(compile=compiling or "none", quantize=quantizing or "none")
