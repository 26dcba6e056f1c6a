"""Prompts -> token numbers, exactly as diffusers' pipelines ask transformers for them: cut and padded to K tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from onestill.checkpoint import ModelInfo, read_json
from onestill.errors import CheckpointError

__all__ = ["PromptTokenizer", "Tokens"]


class Tokens(NamedTuple):
    """B prompts as numbers.

    Attributes:
        ids: [B, K] int64.
        mask: [B, K] int64, 1 for a token and 0 for padding.
        cut: B counts of the tokens that did not fit.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    cut: tuple[int, ...]


class PromptTokenizer:
    """The tokenizer of a model's folder; safe to call from many threads.

    Raises:
        CheckpointError: there is no `tokenizer.json`, or it is not understood.
    """

    def __init__(self, info: ModelInfo) -> None:
        path = info.path / "tokenizer" / "tokenizer.json"
        config = read_json(info.path, "tokenizer/tokenizer_config.json")
        self._tokenizer = _read(path)
        pad = _token(config.get("pad_token")) or _token(config.get("unk_token"))
        pad_id = self._tokenizer.token_to_id(pad)
        if pad_id is None:
            raise CheckpointError(f"'{path}' does not know its own padding token {pad!r}; save the model again.")
        self._tokenizer.enable_truncation(max_length=info.max_tokens)
        self._tokenizer.enable_padding(length=info.max_tokens, pad_id=pad_id, pad_token=pad)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Tokenize B prompts."""
        # One by one: encode_batch starts a thread pool, which a later fork would warn of.
        found = [self._tokenizer.encode(prompt) for prompt in prompts]
        return Tokens(
            ids=np.array([one.ids for one in found], dtype=np.int64),
            mask=np.array([one.attention_mask for one in found], dtype=np.int64),
            cut=tuple(sum(piece.special_tokens_mask.count(0) for piece in one.overflowing) for one in found),
        )


def _read(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"'{path.parent}' has no tokenizer.json; save the tokenizer again with transformers.")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"'{path}' is no tokenizer, or is damaged; copy the model again.") from error


def _token(value: Any) -> str:
    """A special token's text; configs write it as a string or as an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
