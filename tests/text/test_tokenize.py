from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from onestill.checkpoint import ModelInfo, describe
from onestill.errors import CheckpointError, MissingExtraError
from onestill.text.tokenize import PromptTokenizer

PROMPTS = ["a red apple", "", "A Red, APPLE!  on purple", "naïve ☃ apple", "red " * 40, "[PAD] [SEP] apple", "x" * 300]


def test_tokens_are_transformers_own(tiny_folder: Path) -> None:
    tokens = PromptTokenizer(describe(tiny_folder))(PROMPTS)
    slow = AutoTokenizer.from_pretrained(str(tiny_folder / "tokenizer"))
    expected = slow(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="np")
    np.testing.assert_array_equal(tokens.ids, expected["input_ids"])
    np.testing.assert_array_equal(tokens.mask, expected["attention_mask"])
    assert tokens.ids.dtype == np.int64


def test_tokens_that_did_not_fit_are_counted(tiny_folder: Path) -> None:
    tokenize = PromptTokenizer(describe(tiny_folder))
    assert tokenize(["red " * n for n in (1, 14, 15, 40)]).cut == (0, 0, 1, 26)


def test_no_prompts_are_no_rows(tiny_folder: Path) -> None:
    tokens = PromptTokenizer(describe(tiny_folder))([])
    assert (tokens.ids.shape, tokens.mask.shape, tokens.cut) == ((0, 16), (0, 16), ())


def test_berts_tokenizer_needs_no_library(tiny_folder: Path) -> None:
    code = (
        "import sys; from onestill.checkpoint import describe; from onestill.text.tokenize import PromptTokenizer\n"
        f"PromptTokenizer(describe({str(tiny_folder)!r}))(['a red apple'])\n"
        "print(*{'tokenizers', 'transformers', 'huggingface_hub', 'torch'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.fixture
def byte_pairs(tiny_folder: Path, tmp_path: Path) -> ModelInfo:
    """The tiny model with a tokenizer like CLIP's: byte pairs, an end mark that is also the padding."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {token: i for i, token in enumerate([*letters, "re", "red</w>", "<start>", "<end>"])}
    made = Tokenizer(
        models.BPE(vocabulary, [("r", "e"), ("re", "d</w>")], unk_token="<end>", end_of_word_suffix="</w>")
    )
    made.add_special_tokens(["<start>", "<end>"])
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("<end>", "<start>")]
    made.post_processor = processors.RobertaProcessing(*ends)
    made.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = {"model_max_length": 16, "pad_token": "<end>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return describe(folder)


def test_tokenizers_of_another_kind(byte_pairs: ModelInfo) -> None:
    tokens = PromptTokenizer(byte_pairs)(["Red", "red " * 20])
    start, red, end = 54, 53, 55
    assert tokens.ids.tolist() == [[start, red, *[end] * 14], [start, *[red] * 14, end]]
    assert tokens.mask.sum(1).tolist() == [3, 16]
    assert tokens.cut == (0, 6)


def test_what_was_cut_of_byte_pairs_is_counted_whatever_the_file_says_of_cutting(byte_pairs: ModelInfo) -> None:
    path = byte_pairs.path / "tokenizer" / "tokenizer.json"
    made = Tokenizer.from_file(str(path))
    made.enable_truncation(5, stride=2)
    made.enable_padding(length=40)
    made.save(str(path))
    counts = (0, 1, 13, 14, 15, 16, 17, 30, 100, 1000)
    tokens = PromptTokenizer(byte_pairs)(["red " * count for count in counts])
    assert tokens.cut == tuple(max(count - 14, 0) for count in counts)
    assert tokens.mask.sum(1).tolist() == [min(count, 14) + 2 for count in counts]


def test_byte_pairs_without_room_for_words_are_named(byte_pairs: ModelInfo) -> None:
    with pytest.raises(CheckpointError, match="no room for words"):
        PromptTokenizer(dataclasses.replace(byte_pairs, max_tokens=2))


def test_another_kind_without_the_library_is_one_sentence(
    byte_pairs: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"onestill\[torch\]"):
        PromptTokenizer(byte_pairs)


def test_a_missing_or_spoilt_tokenizer_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    path = folder / "tokenizer" / "tokenizer.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "model": {"type": "BPE"}}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*damaged"):
        PromptTokenizer(describe(folder))
    path.write_text(json.dumps(whole)[:200])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*not valid JSON"):
        PromptTokenizer(describe(folder))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        PromptTokenizer(describe(folder))


def test_padding_that_is_no_token_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"pad_token": {"content": "[NONE]"}}')
    with pytest.raises(CheckpointError, match=r"padding token '\[NONE\]'"):
        PromptTokenizer(describe(folder))


def test_a_length_without_room_for_words_is_named(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no room for words"):
        PromptTokenizer(dataclasses.replace(describe(tiny_folder), max_tokens=2))
