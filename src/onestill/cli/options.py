"""Options that several commands share, and the reading of what people type into them."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from onestill.errors import SizeError

__all__ = ["Device", "Dtype", "Engine", "Json", "Model", "parse_size"]

Model = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME|FOLDER", help="A shipped model, or a folder in diffusers' format.")
]
Engine = Annotated[str | None, typer.Option("--engine", metavar="NAME", help="What runs the model: openvino or torch.")]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="Where it runs: cpu, cuda, ...")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help="What it computes in: float32, bfloat16 or float16.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


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
