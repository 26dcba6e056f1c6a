"""Sentences on what was not done to the letter, which come with the pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo
from onestill.pipeline.checks import shortened

__all__ = [
    "NEGATIVE_DID_NOTHING",
    "notes_on_mask",
    "notes_on_partial_images",
    "notes_on_prompts",
    "notes_on_size",
    "notes_on_steps",
]

NEGATIVE_DID_NOTHING = "The negative prompt did nothing: it acts only at a guidance scale above 1."


def notes_on_prompts(prompts: Sequence[str], tokens_cut: Sequence[int], words_cut: Sequence[str]) -> dict[str, str]:
    """On each prompt that did not fit: how many tokens were cut, and from which words on."""
    cut = dict(zip(prompts, zip(tokens_cut, words_cut, strict=True), strict=True))
    return {
        text: f"The prompt '{shortened(text)}' is too long: its last {count} tokens were cut"
        f"{f', from {shortened(words)!r}' if words else ''}."
        for text, (count, words) in cut.items()
        if count
    }


def notes_on_steps(num_inference_steps: int, timesteps: Sequence[int], strength: float | None) -> list[str]:
    """On a strength that is less than one step."""
    if strength is None or round(num_inference_steps * strength, 6) >= 1:
        return []
    return [
        f"A strength of {strength:g} is less than one of {num_inference_steps} steps; one was taken, from timestep "
        f"{timesteps[0]}."
    ]


def notes_on_size(height: int, width: int, info: ModelInfo) -> list[str]:
    """On a size in pixels that the model was not trained to draw."""
    if (height, width) in info.sizes:
        return []
    known = ", ".join(f"{width}x{height}" for height, width in info.sizes)
    return [f"The model was trained to draw {known}; other sizes may repeat or cut what is asked for."]


def notes_on_mask(weights: NDArray[np.uint8] | None) -> list[str]:
    """On a mask [H, W] that leaves nothing to draw."""
    if weights is None or weights.any():
        return []
    return ["The mask keeps the whole image: make transparent, or white where it has no transparency, what to draw."]


def notes_on_partial_images(wanted: int, shown: int) -> list[str]:
    """On partial images that there are no steps for."""
    if shown >= wanted:
        return []
    found = "none" if not shown else "one" if shown == 1 else str(shown)
    return [f"{wanted} partial images were asked for and {found} shown: there is one after each step but the last."]
