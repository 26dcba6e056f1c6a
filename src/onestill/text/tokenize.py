"""Prompts -> token ids, exactly as diffusers' pipelines ask transformers for them: cut and padded to K tokens.

A single file holds no tokenizer; CLIP's, which every model of its families was trained with, comes with the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo, read_json
from onestill.errors import CheckpointError, require
from onestill.text.wordpiece import read_wordpiece, token_text

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_PADDING = {"tokenizer_2": "!"}  # of SDXL's second text encoder; others are padded with their end
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokens(NamedTuple):
    """B prompts as token ids.

    Attributes:
        ids: [B, K] int64.
        mask: [B, K] int64, 1 for a token and 0 for padding.
        cut: B counts of the tokens that did not fit.
        words_cut: B ends of prompts, from the first word that did not fit whole; "" where all fitted.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    cut: tuple[int, ...]
    words_cut: tuple[str, ...]


class PromptTokenizer:
    """The tokenizer of a model; safe to call from many threads.

    BERT's WordPiece is read by the base install, other kinds by the `tokenizers` library.

    Args:
        source: the model; or the folder of a tokenizer by itself.
        component: "tokenizer", or "tokenizer_2" for SDXL's second text encoder, which pads differently.
        max_tokens: K; None is the model's own.

    Raises:
        CheckpointError: there is no tokenizer, or it is not understood.
        MissingExtraError: it is of another kind, and the `tokenizers` library is not installed.
    """

    def __init__(
        self, source: ModelInfo | Path, component: str = "tokenizer", *, max_tokens: int | None = None
    ) -> None:
        if isinstance(source, ModelInfo):
            self._max_tokens, folder = max_tokens or source.max_tokens, source.path / component
        else:
            assert max_tokens is not None
            self._max_tokens, folder = max_tokens, source
        if isinstance(source, ModelInfo) and source.path.is_file():
            self._tokenizer: _Tokenizer = _LibraryTokenizer(*clip_vocabulary())
            pad = CLIP_PADDING.get(component, CLIP_END)
        else:
            pad = _pad_token(folder)
            self._tokenizer = _read_tokenizer(folder)
        # The tokens at both ends stay, however long the prompt.
        self._room = self._max_tokens - self._tokenizer.num_special_tokens
        if self._room < 1:
            raise CheckpointError(
                f"A prompt of {self._max_tokens} tokens has no room for words; correct model_max_length."
            )
        pad_id = self._tokenizer.token_id(pad)
        if pad_id is None:
            raise CheckpointError(f"'{folder}' does not know its own padding token {pad!r}; save the model again.")
        self._pad_id = pad_id
        self._expanded: dict[str, str] = {}
        if isinstance(source, ModelInfo) and source.embeddings:
            if not isinstance(self._tokenizer, _LibraryTokenizer):
                raise CheckpointError(f"'{source.name}' takes no embeddings; give a model with a CLIP.")
            for one in source.embeddings:
                self._tokenizer.add({token: one.first_id + i for i, token in enumerate(one.tokens)})
                self._expanded[one.token] = " ".join(one.tokens)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Tokenize B prompts."""
        for token, tokens in self._expanded.items():
            prompts = [prompt.replace(token, tokens) for prompt in prompts]  # as diffusers does
        found = [self._tokenizer.cut(prompt, self._room) for prompt in prompts]
        ids = np.full((len(found), self._max_tokens), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, real, (prompt_ids, _) in zip(ids, mask, found, strict=True):
            row[: len(prompt_ids)] = prompt_ids
            real[: len(prompt_ids)] = 1
        words_cut = tuple(
            self._end_that_was_cut(prompt) if cut else "" for prompt, (_, cut) in zip(prompts, found, strict=True)
        )
        return Tokens(ids, mask, tuple(cut for _, cut in found), words_cut)

    def _end_that_was_cut(self, prompt: str) -> str:
        """The words of a prompt from the first that did not fit whole, found by halving.

        A word is what white space ends: no tokenizer here makes a token of two.
        """
        words = prompt.split()
        fits, cut = 0, len(words)  # words[:fits] fit, words[:cut] do not
        while cut - fits > 1:
            middle = (fits + cut) // 2
            if self._tokenizer.cut(" ".join(words[:middle]), self._room)[1]:
                cut = middle
            else:
                fits = middle
        return " ".join(words[fits:])


class _Tokenizer(Protocol):
    @property
    def num_special_tokens(self) -> int:
        """How many tokens are put before and behind those of a prompt."""

    def cut(self, prompt: str, room: int) -> tuple[list[int], int]:
        """The ids of at most `room` tokens between those at the ends; and how many tokens did not fit."""

    def token_id(self, token: str) -> int | None:
        """The id of a token, None where there is none."""


def _read_tokenizer(folder: Path) -> _Tokenizer:
    if not (folder / "tokenizer.json").exists() and (folder / "merges.txt").is_file():
        # As the published models have it: CLIP's byte pairs in two files.
        vocabulary = {str(token): int(token_id) for token, token_id in read_json(folder, "vocab.json").items()}
        found = _LibraryTokenizer(vocabulary, _merges((folder / "merges.txt").read_text(encoding="utf-8")))
        found.add(_added_tokens(folder, vocabulary))
        return found
    return read_wordpiece(folder) or _LibraryTokenizer(folder / "tokenizer.json", [])


def _added_tokens(folder: Path, vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Words that were added to a folder's vocabulary, such as textual inversion's, with their ids."""
    listed = read_json(folder, "tokenizer_config.json").get("added_tokens_decoder") or {}
    found = {token_text(token): int(token_id) for token_id, token in listed.items()}
    if (folder / "added_tokens.json").is_file():
        found |= {str(token): int(token_id) for token, token_id in read_json(folder, "added_tokens.json").items()}
    return {token: token_id for token, token_id in found.items() if token and token not in vocabulary}


def _pad_token(folder: Path) -> str:
    config = read_json(folder, "tokenizer_config.json")
    special = read_json(folder, "special_tokens_map.json") if (folder / "special_tokens_map.json").is_file() else {}
    for tokens in (config, special):
        if pad := token_text(tokens.get("pad_token")):
            return pad
    return token_text(config.get("unk_token"))


def _merges(text: str) -> list[tuple[str, str]]:
    lines = [line.split() for line in text.split("\n") if line and not line.startswith("#version")]
    return [(line[0], line[1]) for line in lines if len(line) == 2]


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """OpenAI's CLIP vocabulary, token -> id, and its merges in order."""
    import gzip  # here, as the shipped model starts without it

    packed = Path(__file__).with_name("clip").joinpath("merges.txt.gz").read_bytes()
    merges = _merges(gzip.decompress(packed).decode())
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # A byte is a character: itself where it is printable, else one of those from U+0100 on.
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    last = [f"{character}</w>" for character in characters]  # of a word
    tokens = [*characters, *last, *map("".join, merges), CLIP_START, CLIP_END]
    return {token: i for i, token in enumerate(tokens)}, merges


def write_clip_vocabulary(folder: Path) -> None:
    """Write CLIP's vocabulary into a folder, as the published models have it: `vocab.json` and `merges.txt`."""
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8")


def _clip_tokenizer(library: Any, vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> Any:
    """CLIP's byte pairs as transformers sets them up."""
    made = library.Tokenizer(
        library.models.BPE(dict(vocabulary), merges, end_of_word_suffix="</w>", unk_token=CLIP_END, fuse_unk=False)
    )
    normal, parts = library.normalizers, library.pre_tokenizers
    made.normalizer = normal.Sequence([normal.NFC(), normal.Replace(library.Regex(r"\s+"), " "), normal.Lowercase()])
    words = library.Regex(CLIP_WORDS)
    made.pre_tokenizer = parts.Sequence(
        [parts.Split(words, behavior="removed", invert=True), parts.ByteLevel(add_prefix_space=False)]
    )
    made.add_special_tokens([CLIP_START, CLIP_END])
    ends = ((CLIP_END, vocabulary[CLIP_END]), (CLIP_START, vocabulary[CLIP_START]))
    made.post_processor = library.processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return made


class _LibraryTokenizer:
    """Any tokenizer by the `tokenizers` library: a `tokenizer.json`, or CLIP's with this vocabulary and merges."""

    def __init__(self, source: Path | Mapping[str, int], merges: list[tuple[str, str]]) -> None:
        library = require("tokenizers", "torch")
        try:
            self._tokenizer: Any = (
                library.Tokenizer.from_file(str(source))
                if isinstance(source, Path)
                else _clip_tokenizer(library, source, merges)
            )
        except Exception as error:  # the library raises nothing narrower
            where = f"'{source}'" if isinstance(source, Path) else "vocab.json with merges.txt"
            raise CheckpointError(f"{where} is no tokenizer, or is damaged; copy the model again.") from error
        # What did not fit is counted here: of what the library cuts off, its versions report different numbers.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.num_special_tokens: int = self._tokenizer.num_special_tokens_to_add(False)

    def add(self, tokens: Mapping[str, int]) -> None:
        """Add whole words, which get these ids: the next ones, or it is an error."""
        for token, token_id in sorted(tokens.items(), key=lambda one: one[1]):
            self._tokenizer.add_tokens([token])
            if self.token_id(token) != token_id:
                raise CheckpointError(
                    f"The added token {token!r} should be number {token_id} and is {self.token_id(token)}; it is there "
                    "twice, or the tokenizer is not the text encoder's: copy the model again."
                )

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def cut(self, prompt: str, room: int) -> tuple[list[int], int]:
        found = self._tokenizer.encode(prompt, add_special_tokens=False)
        cut = max(len(found) - room, 0)
        if cut:
            found.truncate(room)
        return self._tokenizer.post_process(found).ids, cut
