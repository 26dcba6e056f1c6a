"""One contender of a latency comparison: what it is asked for, and what it is once it can draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

CONTENDERS = ("onestill", "diffusers", "diffusers compiled")
PARTS = ("encode_ms", "denoise_ms", "decode_ms", "total_ms")

Draw = Callable[[Sequence[str], int], Mapping[str, float]]  # (prompts, seed) -> milliseconds by part


@dataclass(frozen=True)
class Setting:
    """One contender and what it is asked for.

    Attributes:
        contender: one of `CONTENDERS`.
        model: a name, folder, file or Hub id; a folder or Hub id for diffusers.
        engine, device, dtype, threads: as in `onestill.load`; diffusers takes those that it has.
        tiny_vae: a folder with a tiny decoder, or None.
        options: ours, what `onestill.engine.TorchOptions` takes; None is the fast way on a GPU and the plain on a CPU.
        steps, height, width: None is the model's own.
        batch: images to a call.
        warm_up: calls before those that count.
        pictures: calls that count.
        repeats: calls after those, of a prompt that was just drawn.
        seed: of the first image.
        picture: a file to which the first image of the first call is saved, so that contenders can be compared.
    """

    contender: str
    model: str
    engine: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    tiny_vae: str | None = None
    options: Mapping[str, Any] | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int = 1
    warm_up: int = 3
    pictures: int = 20
    repeats: int = 5
    seed: int = 1
    picture: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A contender that can draw.

    Attributes:
        draw: (prompts, seed of the first image) -> milliseconds by part, `PARTS`.
        facts: `engine`, `device`, `dtype`, and `dtypes`: what "text", "unet" and "decoder" each compute in.
    """

    draw: Draw
    facts: Mapping[str, Any]


def with_contender(setting: Setting, contender: str) -> Setting:
    """The same, asked of another: what only ours understands is left out."""
    if contender == "onestill":
        return setting
    dtype = None if setting.dtype == "int8" else setting.dtype
    return replace(setting, contender=contender, engine=None, options=None, dtype=dtype)
