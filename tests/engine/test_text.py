from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from onestill.checkpoint import describe
from onestill.engine.text import PromptTokenizer
from onestill.errors import CheckpointError

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


def test_a_missing_or_spoilt_tokenizer_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*damaged"):
        PromptTokenizer(describe(folder))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        PromptTokenizer(describe(folder))
