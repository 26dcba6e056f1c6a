"""Prompts -> token numbers, exactly as diffusers' pipelines ask transformers for them: cut and padded to K tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo, read_json
from onestill.engine.wordpiece import WordPiece, read_wordpiece, token_text
from onestill.errors import CheckpointError, require

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

    BERT's WordPiece is read by the base install, other kinds by the `tokenizers` library.

    Raises:
        CheckpointError: there is no tokenizer, or it is not understood.
        MissingExtraError: it is of another kind, and the `tokenizers` library is not installed.
    """

    def __init__(self, info: ModelInfo) -> None:
        folder = info.path / "tokenizer"
        config = read_json(info.path, "tokenizer/tokenizer_config.json")
        pieces = read_wordpiece(folder)
        self._cutter: _Cutter = (
            _WordPieces(pieces, info.max_tokens) if pieces else _OtherPieces(folder / "tokenizer.json", info.max_tokens)
        )
        self._max_tokens = info.max_tokens
        pad = token_text(config.get("pad_token")) or token_text(config.get("unk_token"))
        pad_id = self._cutter.number(pad)
        if pad_id is None:
            raise CheckpointError(f"'{folder}' does not know its own padding token {pad!r}; save the model again.")
        self._pad_id = pad_id

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Tokenize B prompts."""
        found = [self._cutter(prompt) for prompt in prompts]
        ids = np.full((len(found), self._max_tokens), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, told, (numbers, _) in zip(ids, mask, found, strict=True):
            row[: len(numbers)] = numbers
            told[: len(numbers)] = 1
        return Tokens(ids, mask, tuple(cut for _, cut in found))


class _Cutter(Protocol):
    def __call__(self, prompt: str) -> tuple[list[int], int]:
        """The numbers of at most K tokens with their marks, unpadded; and how many tokens did not fit."""

    def number(self, token: str) -> int | None:
        """The number of a token, None where there is none."""


class _WordPieces:
    def __init__(self, pieces: WordPiece, max_tokens: int) -> None:
        self._pieces = pieces
        self._room = max_tokens - 2  # the marks at both ends stay, however long the prompt
        if self._room < 1:
            raise CheckpointError(f"A prompt of {max_tokens} tokens has no room for words; correct model_max_length.")
        self.number = pieces.number

    def __call__(self, prompt: str) -> tuple[list[int], int]:
        numbers = self._pieces(prompt)
        kept = numbers[: self._room]
        return [self._pieces.start, *kept, self._pieces.end], len(numbers) - len(kept)


class _OtherPieces:
    def __init__(self, path: Path, max_tokens: int) -> None:
        library = require("tokenizers", "torch")
        try:
            self._tokenizer: Any = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"'{path}' is no tokenizer, or is damaged; copy the model again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=max_tokens)

    def number(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def __call__(self, prompt: str) -> tuple[list[int], int]:
        found = self._tokenizer.encode(prompt)
        return found.ids, sum(piece.special_tokens_mask.count(0) for piece in found.overflowing)
