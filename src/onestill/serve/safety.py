"""Filters of prompts and pictures. A model's card may ask for one; otherwise they are off.

A prompt filter takes a prompt and returns why it is refused, or None. An image filter takes PIL images and returns for
each whether it must not be shown. Both run in a thread, so they may be slow.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL.Image import Image

from onestill.checkpoint import ModelInfo, read_json
from onestill.errors import OnestillError
from onestill.serve.errors import ApiError

__all__ = [
    "ImageFilter",
    "PromptFilter",
    "blocked_words",
    "card_asks_for_filter",
    "named_filter",
    "refuse_pictures",
    "refuse_prompt",
]

PromptFilter: TypeAlias = Callable[[str], str | None]
ImageFilter: TypeAlias = Callable[[Sequence[Image]], Sequence[bool]]


def refuse_prompt(reason: str | None) -> None:
    """Raise ApiError where a prompt filter gave a reason."""
    if reason is not None:
        raise ApiError(400, f"This prompt is refused: {reason}.", "moderation_blocked", param="prompt")


def refuse_pictures(found: Sequence[bool]) -> None:
    """Raise ApiError where an image filter refused a picture."""
    if any(found):
        raise ApiError(400, "The image filter refuses this picture; try another prompt.", "moderation_blocked")


def blocked_words(path: Path) -> PromptFilter:
    """A filter that refuses prompts with one of the words or phrases of a file, one a line.

    Case, accents and invisible characters make no difference, as a tokenizer ignores them too.

    Raises:
        OnestillError: the file cannot be read, or has no words.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise OnestillError(
            f"The words in '{path}' cannot be read; give a text file with one word on each line."
        ) from error
    words = [word for line in lines if not line.startswith("#") and (word := _plain(line))]
    if not words:
        raise OnestillError(f"'{path}' has no words; write one word on each line.")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)")

    def refuse(prompt: str) -> str | None:
        return "it has a blocked word" if pattern.search(_plain(prompt)) else None

    return refuse


def _plain(text: str) -> str:
    """A text without case, accents and invisible characters, its words separated by one space."""
    visible = (
        one
        for one in unicodedata.normalize("NFKD", text)
        if one in "\t\n\r" or (unicodedata.category(one)[0] != "C" and unicodedata.category(one) != "Mn")
    )
    return " ".join("".join(visible).replace("\ufffd", "").casefold().split())


def named_filter(name: str) -> Any:
    """A filter by its name `package.module:function`, from an installed package.

    Raises:
        OnestillError: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise OnestillError(f"There is no '{name}'; give an installed package.module:function.") from error
    if not callable(found):
        raise OnestillError(f"'{name}' is not a function; give an installed package.module:function.")
    return found


def card_asks_for_filter(info: ModelInfo) -> bool:
    """Whether the model asks for an image filter, by `requires_safety_checker` in its `model_index.json`."""
    return bool(read_json(info.path, "model_index.json").get("requires_safety_checker", False))
