from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from onestill.errors import RecipeError
from onestill.train.methods.autoencoder import Method, Options, build
from onestill.train.recipe import LoopOptions

SIZES = {
    "latent_channels": 4,
    "encoder_width": 8,
    "decoder_width": 8,
    "encoder_blocks": [0, 1],
    "decoder_blocks": [1, 0],
}


def test_training_goes_on_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    build(Options(**SIZES)).save_pretrained(tmp_path)
    started = Method(Options(**SIZES, start=str(tmp_path)), LoopOptions(seed=2)).autoencoder
    fresh = Method(Options(**SIZES), LoopOptions(seed=2)).autoencoder
    torch.manual_seed(1)
    saved = build(Options(**SIZES)).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in started.state_dict().items())
    assert any(not torch.equal(value, saved[name]) for name, value in fresh.state_dict().items())
    assert all(parameter.requires_grad for parameter in started.parameters())


def test_a_start_of_other_sizes_is_refused(tmp_path: Path) -> None:
    build(Options(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=re.escape(f"'{tmp_path}' has other sizes")):
        Method(Options(**SIZES | {"decoder_width": 16}, start=str(tmp_path)), LoopOptions())
