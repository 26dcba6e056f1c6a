"""What a call of the pipeline may ask for, checked before anything is computed: each refusal is one sentence."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from onestill.checkpoint import ModelInfo
from onestill.errors import PromptError, SizeError, StepsError

MOST_STEPS = 50
MOST_IMAGES = 1000  # in one call
MOST_LETTERS = 32_000  # of a prompt, as in OpenAI's API; far beyond any model's tokens
MOST_GUIDANCE = 50.0
LEAST_PX, MOST_PX = 64, 2048  # of a side, where a model draws more than its own sizes


def checked_prompts(prompt: str | Sequence[str]) -> list[str]:
    """The prompts as a list of texts that something can be drawn from."""
    prompts = listed(prompt)
    for text in prompts:
        check_text(text)
    if not prompts or not all(text.strip() for text in prompts):
        raise PromptError("The prompt is empty; say what to draw, such as 'a red apple'.")
    return prompts


def listed(prompt: object) -> list[str]:
    """One thing as a list of it; a list or tuple as it is."""
    return list(prompt) if isinstance(prompt, list | tuple) else [prompt]  # type: ignore[list-item] # checked next


def check_text(text: object) -> None:
    """Refuse what is no text, or too long a one."""
    if not isinstance(text, str):
        raise PromptError(f"A prompt must be text, not {type(text).__name__}.")
    if len(text) > MOST_LETTERS:
        raise PromptError(f"The prompt has {len(text)} letters; write at most {MOST_LETTERS}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError("The prompt is no valid Unicode text; check the encoding it was read with.") from error


def matched_negatives(
    negative: str | Sequence[str] | None, prompts: Sequence[str], each: int
) -> list[str] | list[None]:
    """One negative prompt for each image, or None for each where none is given."""
    if negative is None:
        return [None] * len(prompts)
    negatives = listed(negative)
    for text in negatives:
        check_text(text)
    if not isinstance(negative, list | tuple):
        return negatives * len(prompts)
    if len(negatives) * each != len(prompts):
        raise PromptError(
            f"{len(negatives)} negative prompts do not match {len(prompts) // each} prompts; give as many."
        )
    return [text for text in negatives for _ in range(each)]


def checked_whole(name: str, value: int, most: int) -> int:
    """A whole number from 1 to `most`."""
    if not is_whole(value) or not 1 <= value <= most:
        raise StepsError(f"{name} is {value}; choose a whole number from 1 to {most}.")
    return int(value)


def checked_guidance(scale: object) -> float:
    """A guidance scale in its range."""
    if not isinstance(scale, int | float | np.number) or not 0 <= scale <= MOST_GUIDANCE:
        raise StepsError(f"guidance_scale is {scale}; choose a number from 0 to {MOST_GUIDANCE:g}, 1 for none.")
    return float(scale)


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of `count` images: those of a list, or from a given one or a random one upwards."""
    if count > MOST_IMAGES:
        raise StepsError(f"{count} images are too many for one call; ask for at most {MOST_IMAGES}.")
    if isinstance(seed, list | tuple):
        if len(seed) != count:
            raise StepsError(f"{len(seed)} seeds do not match {count} images; give as many.")
        return [checked_seed(one, 1) for one in seed]
    first = checked_seed(secrets.randbelow(2**32 - count) if seed is None else seed, count)
    return [first + i for i in range(count)]


def checked_seed(first: object, count: int) -> int:
    """A seed from which `count` can be counted upwards."""
    if not is_whole(first) or not 0 <= first <= 2**63 - count:  # type: ignore[operator] # a whole number by then
        raise StepsError(f"The seed is {first}; choose a whole number from 0 to {2**63 - count}.")
    return int(first)  # type: ignore[call-overload,no-any-return]


def checked_size(height: int | None, width: int | None, info: ModelInfo) -> tuple[int, int]:
    """(height, width) in pixels that the model can draw; its own where None."""
    size = (info.height if height is None else height, info.width if width is None else width)
    if size in info.sizes:
        return size
    if not info.size_multiple:
        names = ", ".join(f"{width}x{height}" for height, width in info.sizes)
        raise SizeError(f"The model '{info.name}' cannot draw {size[1]}x{size[0]} pixels; choose from {names}.")
    least = min(LEAST_PX, info.height, info.width)
    if not all(is_whole(side) and least <= side <= MOST_PX for side in size):
        raise SizeError(f"{size[1]}x{size[0]} pixels cannot be drawn; choose sides from {least} to {MOST_PX}.")
    if any(side % info.size_multiple for side in size):
        near = "x".join(str(round(side / info.size_multiple) * info.size_multiple) for side in reversed(size))
        raise SizeError(
            f"{size[1]}x{size[0]} pixels cannot be drawn: sides must be divisible by {info.size_multiple}; try {near}."
        )
    return size


def checked_pair(name: str, pair: Sequence[int] | None, default: tuple[int, int]) -> tuple[int, int]:
    """A (height, width) or (top, left) of micro-conditioning, in pixels."""
    pair = default if pair is None else tuple(pair)
    if len(pair) != 2 or not all(is_whole(side) and 0 <= side <= 2**14 for side in pair):
        raise SizeError(f"{name} is {pair}; give two whole numbers of pixels, from 0 to {2**14}.")
    return int(pair[0]), int(pair[1])


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or NumPy, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def shortened(text: str) -> str:
    """A text short enough to quote in a sentence."""
    return text if len(text) <= 40 else f"{text[:40].rstrip()}…"
