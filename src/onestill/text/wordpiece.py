"""BERT's WordPiece: text -> token ids, equal to the `tokenizers` library's.

It is our own because the base install must stay small: `tokenizers` takes 12 MB, and the packages that it alone would
bring, `huggingface_hub`, `hf-xet` and an HTTP client among them, 29 MB more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onestill.checkpoint import read_json
from onestill.errors import CheckpointError
from onestill.text.bert_normalizer import BertNormalizer


class WordPiece:
    """Text -> token ids: all of them, without padding and without `start` and `end`.

    Args:
        vocabulary: token -> id.
        special: tokens that are taken whole where a text holds them, e.g. "[SEP]" -> id.
        ends: the ids of [CLS] and [SEP], which belong before and after the text.
        normalizer: splits a text into words.
        unknown: the token of words that the vocabulary cannot make.
        prefix: what the vocabulary writes before a piece that is not a word's first.
        longest_word: words of more characters are unknown.

    Raises:
        KeyError: the vocabulary lacks `unknown`.
    """

    num_special_tokens = 2  # that `cut` adds

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        special: Mapping[str, int],
        ends: tuple[int, int],
        normalizer: BertNormalizer,
        *,
        unknown: str = "[UNK]",
        prefix: str = "##",
        longest_word: int = 100,
    ) -> None:
        self.start, self.end = ends
        self._vocabulary, self._special, self.normalizer = vocabulary, special, normalizer
        self._unknown = [vocabulary[unknown]]
        self._prefix, self._longest_word, self._longest = prefix, longest_word, max(map(len, vocabulary))
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def __call__(self, text: str) -> list[int]:
        """The token ids of a text of any length. Safe to call from many threads."""
        found: list[int] = []
        for i, part in enumerate(self._special_pattern.split(text)):
            if i % 2:
                found.append(self._special[part])
            else:
                for word in self.normalizer(part):
                    found += self._pieces(word)
        return found

    def cut(self, text: str, room: int) -> tuple[list[int], int]:
        """The ids of at most `room` tokens between `start` and `end`; and how many tokens did not fit."""
        ids = self(text)
        return [self.start, *ids[:room], self.end], max(len(ids) - room, 0)

    def token_id(self, token: str) -> int | None:
        """The id of a token, special or not; None where there is none."""
        return self._special.get(token, self._vocabulary.get(token))

    def _pieces(self, word: str) -> list[int]:
        """The longest piece that the vocabulary has, again and again; a word with a rest is unknown as a whole."""
        if len(word) > self._longest_word:
            return self._unknown
        pieces: list[int] = []
        start = 0
        while start < len(word):
            prefix = self._prefix if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                piece = self._vocabulary.get(prefix + word[start:end])
                if piece is not None:
                    break
            else:
                return self._unknown
            pieces.append(piece)
            start = end
        return pieces


def read_wordpiece(folder: Path) -> WordPiece | None:
    """The tokenizer in a folder, from `tokenizer.json`, else from `vocab.txt` and `tokenizer_config.json`.

    Returns:
        None where it is of another kind, or a WordPiece with settings that BERT's never has.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    listed = (folder / "vocab.txt").is_file() and not (folder / "tokenizer.json").exists()
    path = folder / ("vocab.txt" if listed else "tokenizer.json")
    data = read_json(folder, "tokenizer_config.json" if listed else path.name)
    try:
        return _from_list(path.read_text(encoding="utf-8"), data) if listed else _from_json(data)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}' is no tokenizer, or is damaged; copy the model again.") from error


def token_text(value: Any) -> str:
    """A special token's text; configs write it as a string or as an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _from_json(data: Mapping[str, Any]) -> WordPiece | None:
    model, normalizer, post = data["model"], data["normalizer"] or {}, data["post_processor"] or {}
    kinds = [(data[part] or {}).get("type") for part in ("model", "normalizer", "pre_tokenizer")]
    if kinds != ["WordPiece", "BertNormalizer", "BertPreTokenizer"] or not normalizer["clean_text"]:
        return None
    if post.get("type") == "BertProcessing":
        ends = [[post["cls"][1]], [post["sep"][1]]]
    else:
        template = [dict(part) for part in post.get("single", [])]
        if [[*part] for part in template] != [["SpecialToken"], ["Sequence"], ["SpecialToken"]]:
            return None
        ends = [post["special_tokens"][template[i]["SpecialToken"]["id"]]["ids"] for i in (0, 2)]
    odd = any(token[how] for token in data["added_tokens"] for how in ("lstrip", "rstrip", "single_word", "normalized"))
    if odd or [len(ids) for ids in ends] != [1, 1]:
        return None
    return WordPiece(
        model["vocab"],
        {token["content"]: token["id"] for token in data["added_tokens"]},
        (ends[0][0], ends[1][0]),
        _normalizer(normalizer["lowercase"], normalizer["strip_accents"], normalizer["handle_chinese_chars"]),
        unknown=model["unk_token"],
        prefix=model["continuing_subword_prefix"],
        longest_word=model["max_input_chars_per_word"],
    )


def _from_list(lines: str, config: Mapping[str, Any]) -> WordPiece:
    vocabulary = {line.rstrip(): i for i, line in enumerate(lines.rstrip("\n").split("\n"))}
    tokens = ("pad", "unk", "cls", "sep", "mask")
    names = {name: token_text(config.get(f"{name}_token")) or f"[{name.upper()}]" for name in tokens}
    special = {token: vocabulary[token] for token in names.values() if token in vocabulary}
    lowercase, accents = config.get("do_lower_case", True), config.get("strip_accents")
    normalizer = _normalizer(lowercase, accents, config.get("tokenize_chinese_chars", True))
    return WordPiece(
        vocabulary, special, (vocabulary[names["cls"]], vocabulary[names["sep"]]), normalizer, unknown=names["unk"]
    )


def _normalizer(lowercase: bool, strip_accents: bool | None, space_ideographs: bool) -> BertNormalizer:
    strip = lowercase if strip_accents is None else strip_accents
    return BertNormalizer(lowercase=lowercase, strip_accents=strip, space_ideographs=space_ideographs)
