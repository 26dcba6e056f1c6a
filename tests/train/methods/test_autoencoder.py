from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from onestill.errors import RecipeError
from onestill.train.lpips import LPIPS
from onestill.train.methods.autoencoder import Method, Options, build, window
from onestill.train.noise import Draw
from onestill.train.recipe import LoopOptions
from onestill.train.state import TrainState

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


def test_a_window_reaches_every_edge_and_stays_inside() -> None:
    draw = Draw(torch.Generator().manual_seed(0))
    state: Any = SimpleNamespace(draw=draw)
    found = [window(64, 16, state) for _ in range(300)]
    for part in (0, 1):
        starts = [pair[part].start for pair in found]
        assert min(starts) == 0
        assert max(starts) == 48
        assert all(pair[part].stop - pair[part].start == 16 for pair in found)
        assert sum(start == 0 for start in starts) > 15
    assert window(8, 16, state) == (slice(0, 8), slice(0, 8))


def test_lpips_is_part_of_the_loss_and_needs_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(LPIPS().state_dict(), tmp_path / "lpips.safetensors")
    batch = {"images": torch.rand(2, 3, 32, 32) * 2 - 1, "captions": ["a", "b"]}
    losses = []
    for weight in (0.0, 0.5):
        file = str(tmp_path / "lpips.safetensors")
        options = Options(**SIZES, perceptual=weight, perceptual_network=file, perceptual_window=16)
        method = Method(options, LoopOptions(seed=1))
        method.to(torch.device("cpu"))
        state = TrainState(method.networks, method.optimizers, {}, torch.Generator().manual_seed(0))
        [(_, loss, metrics)] = method.step(state, batch)
        losses.append((loss.detach(), metrics.get("perceptual")))
    (plain, nothing), (with_lpips, distance) = losses
    assert nothing is None
    assert distance is not None
    torch.testing.assert_close(with_lpips, plain + 0.5 * distance.detach())
    with pytest.raises(RecipeError, match=r"set perceptual_network"):
        Method(Options(**SIZES, perceptual=0.5), LoopOptions())
