"""Options that several commands share, and the reading of what people type into them.

Options that belong together are the fields of a dataclass, a group, which a command decorated with `with_groups` takes
as one argument. The option's name is the field's, with hyphens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from onestill.errors import OnestillError, SizeError

if TYPE_CHECKING:
    from onestill.engine.protocol import TorchOptions


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command as Typer reads it: each argument that is a dataclass becomes one option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, parameter in signature(command).parameters.items():
        group = hints[name]
        if not is_dataclass(group):
            parameters.append(parameter.replace(annotation=group))
            continue
        types = get_type_hints(group, include_extras=True)
        options = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name])
            for field in fields(group)
        ]
        parameters += options
        groups[name] = group, [option.name for option in options]

    @wraps(command)
    def run(**values: Any) -> None:
        for name, (group, options) in groups.items():
            values[name] = group(**{option: values.pop(option) for option in options})
        command(**values)

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined] # which `inspect.signature` takes
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|PATH|ID",
        help="A shipped model, a folder in diffusers' format, a .safetensors file, or a Hub id.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Where torch runs it: cpu, cuda, cuda:1, mps. (default: auto, a GPU where torch has one)"
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How to draw where the files do not say: turbo, lightning, lcm, dmd2, base. (default: by the files)",
    ),
]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Size of each picture in pixels. (default: the model's)")]
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


@dataclass(frozen=True)
class RuntimeOptions:
    """What runs a model, and where; fields as in `onestill.load`."""

    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What runs the model: openvino or torch. (default: auto, openvino where the model has that form)",
        ),
    ] = None
    device: Device = None
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What it computes in: float32, bfloat16, float16, int8. (default: the fastest on this machine)",
        ),
    ] = None


@dataclass(frozen=True)
class AdditionOptions:
    """What is put on top of a model."""

    unet: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A folder or file with a UNet that replaces the model's. (default: none)"),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:SCALE]", help="A LoRA file and its scale. May be repeated. (default scale: 1)"),
    ] = None
    tiny_vae: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A tiny decoder: TAESD, or TAESDXL for SDXL. (default: the model's VAE)"),
    ] = None
    preset: Preset = None
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the network's output means: eps, v, v-zsnr, x0, edm, edm-v. (default: by the files)",
        ),
    ] = None
    embedding: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A file with a trained word for prompts. May be repeated. (default: none)"),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """As `onestill.load` and `Additions.of` take them."""
        return vars(self) | {"lora": parse_loras(self.lora)}


@dataclass(frozen=True)
class CompileOptions:
    """How torch computes."""

    compile: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="What torch compiles: regional (about a minute) or whole (minutes). (default: nothing)",
        ),
    ] = None
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Store the UNet's large layers in int8 or fp8, with torchao. (default: neither)"
        ),
    ] = None

    def asked(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def torch_options(self) -> TorchOptions | None:
        """As `onestill.load` takes them; None where none was given."""
        if not self.asked():
            return None
        from onestill.engine.protocol import TorchOptions

        return TorchOptions(**self.asked())


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """(height, width) in pixels from `256x128`, which is width x height, or from `256`; (None, None) from None."""
    if text is None:
        return None, None
    match = re.fullmatch(r"\s*(\d{1,6})(?:\s*[xX×]\s*(\d{1,6}))?\s*", text)  # noqa: RUF001 (people paste that sign)
    if match is None:
        raise SizeError(f"The size '{text}' is not understood; write it as WIDTHxHEIGHT in pixels, such as 256x256.")
    width = int(match[1])
    return int(match[2] or width), width


def parse_daily(text: str | None) -> int | None:
    """Pictures a day from `50/day` or `50`; None from None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,9})\s*(/\s*day)?\s*", text)
    if match is None:
        raise OnestillError(f"The limit '{text}' is not understood; write it as pictures a day, such as 200/day.")
    return int(match[1])


def parse_loras(texts: list[str] | None) -> dict[Path, float]:
    """LoRA files and what each is multiplied by, from `file.safetensors` or `file.safetensors:0.7`; twice adds up."""
    found: dict[Path, float] = {}
    for text in map(os.path.expanduser, texts or []):
        path, colon, scale = text.rpartition(":") if not Path(text).exists() else (text, "", "")
        if colon and not re.fullmatch(r"-?\d*\.?\d+", scale):
            raise OnestillError(f"The LoRA '{text}' is not understood; write it as FILE or FILE:SCALE, such as x:0.7.")
        file = Path(path if colon else text)
        found[file] = found.get(file, 0.0) + (float(scale) if colon else 1.0)
    return found
