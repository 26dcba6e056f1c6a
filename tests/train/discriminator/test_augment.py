from __future__ import annotations

import pytest
import torch

from onestill.train.discriminator.augment import Augmentation, colour, translate
from onestill.train.noise import Draw


def new(kinds: list[str], count: int = 4, seed: int = 0) -> Augmentation:
    draw = Draw(torch.Generator().manual_seed(seed))
    return Augmentation(kinds, count, (16, 16), draw, torch.device("cpu"))


def pictures(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(9)) * 2 - 1


def test_one_draw_changes_two_batches_alike() -> None:
    change, x = new(["colour", "translation", "cutout"]), pictures()
    assert torch.equal(change(x), change(x.clone()))
    assert not torch.equal(change(x), x)
    assert not torch.equal(change(x), new(["colour", "translation", "cutout"], seed=1)(x))
    assert torch.equal(new([])(x), x)


def test_colour_in_closed_form() -> None:
    x = pictures()
    torch.testing.assert_close(colour(x, torch.full((4, 3), 0.5)), x)
    brighter = colour(x, torch.tensor([[0.9, 0.5, 0.5]] * 4))
    torch.testing.assert_close(brighter, x + 0.4)
    grey = colour(x, torch.tensor([[0.5, 0.0, 0.5]] * 4))
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x))
    flat = colour(x, torch.tensor([[0.5, 0.5, 0.0]] * 4))
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(flat, mean + (x - mean) / 2)


def test_translation_moves_and_fills_with_nothing() -> None:
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3).expand(4, 1, 3, 3)
    down, left, still, gone = translate(x, torch.tensor([[1, 0], [0, -2], [0, 0], [3, 0]]))[:, 0]
    assert down.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert left.tolist() == [[3, 0, 0], [6, 0, 0], [9, 0, 0]]
    assert torch.equal(still, x[0, 0])
    assert gone.abs().sum() == 0


def test_cutout_takes_at_most_a_quarter() -> None:
    x = torch.ones(50, 3, 16, 16)
    kept = new(["cutout"], 50)(x)
    lost = (kept == 0).float().mean((1, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert float(lost.max()) == pytest.approx(0.25)
    assert float(lost.min()) > 0


def test_gradients_pass() -> None:
    x = pictures().requires_grad_()
    new(["colour", "translation", "cutout"])(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
