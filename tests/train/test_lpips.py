from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onestill.errors import CheckpointError
from onestill.train.lpips import LPIPS, WIDTHS


def test_equal_pictures_are_no_distance_apart_and_noise_is_farther_the_more_there_is() -> None:
    torch.manual_seed(0)
    lpips = LPIPS()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = torch.randn_like(x)
    distances = [lpips(x, x + share * noise) for share in (0.0, 0.05, 0.5)]
    assert torch.equal(distances[0], torch.zeros(2))
    assert (distances[1] < distances[2]).all()
    assert distances[2].shape == (2,)


def test_the_distance_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    lpips = LPIPS()
    for weight in lpips.weights:
        weight.data.uniform_(0, 1)
    x, y = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    by_hand = torch.zeros(())
    for weight, one, other in zip(lpips.weights, lpips.network(x), lpips.network(y), strict=True):
        difference = torch.nn.functional.normalize(one, dim=1) - torch.nn.functional.normalize(other, dim=1)
        by_hand = by_hand + (weight.view(1, -1, 1, 1) * difference.square()).sum(1).mean()
    torch.testing.assert_close(lpips(x, y)[0], by_hand, rtol=1e-4, atol=1e-6)
    assert [stage.shape[1] for stage in lpips.network(x)] == list(WIDTHS)


def test_gradients_flow_into_what_is_made_alone() -> None:
    torch.manual_seed(0)
    lpips = LPIPS()
    x, y = (torch.rand(1, 3, 16, 16).requires_grad_() for _ in range(2))
    lpips(x, y).sum().backward()
    assert x.grad is None
    assert y.grad is not None
    assert y.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in lpips.parameters())


def test_other_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    for name in ("other.safetensors", "none.safetensors"):
        with pytest.raises(CheckpointError, match=r"holds no weights of LPIPS: make it with python -m recipes"):
            LPIPS.load(tmp_path / name)
    save_file(LPIPS().state_dict(), tmp_path / "own.safetensors")
    LPIPS.load(tmp_path / "own.safetensors")
