from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onestill.errors import RecipeError
from onestill.train.discriminator.inputs import View
from onestill.train.methods.add import Method
from onestill.train.noise import Draw
from tests.train.parts import CHANNELS, SIZE, add_method, condition, latents_batch, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def new(parts: Path, seed: int = 0, **options: Any) -> tuple[Method, View, Tensor]:
    method = add_method(parts, **options)
    latents = latents_batch()["latents"]
    return method, method.views.draw(latents, Draw(torch.Generator().manual_seed(seed))), latents


def vit(parts: Path, **options: Any) -> dict[str, Any]:
    return {"feature_network": "vit", "vit": str(parts / "dinov2"), "vit_layers": [0, 2], **options}


def test_one_view_shows_equal_latents_alike(parts: Path) -> None:
    method, view, latents = new(parts, **vit(parts, vit_size=8, crop=2, augment=["colour", "cutout"]))
    told = condition(latents_batch())
    for mine, same in zip(view(latents, told), view(latents.clone(), told), strict=True):
        assert torch.equal(mine, same)
    other = method.views.draw(latents, Draw(torch.Generator().manual_seed(1)))
    assert not torch.equal(view(latents, told)[0], other(latents, told)[0])


def test_a_crop_decodes_a_window_alone_and_once(parts: Path) -> None:
    method, view, latents = new(parts, **vit(parts, vit_size=8, crop=2))
    row, column, side = view._window
    assert side == 2
    expected = method.space.decode(latents[:, :, row : row + 2, column : column + 2])
    torch.testing.assert_close(view.pixels(latents), expected)
    assert view.pixels(latents) is view.pixels(latents)
    windows = {new(parts, seed, **vit(parts, vit_size=8, crop=2))[1]._window[:2] for seed in range(6)}
    assert len(windows) > 1


def test_a_vit_is_shown_a_window_of_its_own_size_as_often_as_said(parts: Path) -> None:
    for share, often in ((0.0, [False] * 4), (1.0, [True] * 4)):
        views = [new(parts, seed, **vit(parts, vit_size=16, vit_crop=share))[1] for seed in range(4)]
        assert [view._corner is not None for view in views] == often
        assert views[0]._seen(latents_batch()["latents"]).shape[-1] == (16 if share else 32)


def test_latents_are_rolled_and_pictures_decoded(parts: Path) -> None:
    _, view, latents = new(parts, feature_network="tower", shift=1)
    assert torch.equal(view._seen(latents), torch.roll(latents, view._shift, (2, 3)))
    _, view, _ = new(parts, feature_network="tower", tower=str(parts / "pixels"), adversarial_space="pixels")
    assert view._seen(latents).shape == (4, 3, 8 * SIZE, 8 * SIZE)


def test_one_more_head_sees_the_latents_as_they_are(parts: Path) -> None:
    plain, _, _ = new(parts, feature_network="teacher")
    method, view, latents = new(parts, feature_network="teacher", latents_too=True)
    assert method.views.widths == [*plain.views.widths, CHANNELS]
    last = view(latents, condition(latents_batch()))[-1]
    assert torch.equal(last, torch.roll(latents, view._shift, (2, 3)).flatten(2).transpose(1, 2))


def test_noise_levels_lie_where_the_recipe_says(parts: Path) -> None:
    method, view, latents = new(parts, feature_network="teacher", feature_low=100, feature_high=110)
    assert view.at.min() >= 100
    assert view.at.max() <= 110
    assert latents.shape == (4, CHANNELS, SIZE, SIZE)
    assert method.views.embed(latents).shape == (4, method.views.image_encoder.embedding_width)


def test_a_cnn_sees_pictures_and_needs_a_folder(parts: Path) -> None:
    method, view, latents = new(parts, feature_network="cnn+teacher", cnn=str(parts / "lite0"), shift=0)
    first, *_ = view(latents, condition(latents_batch()))
    torch.testing.assert_close(first, method.views.networks[0].taps(method.space.decode(latents))[0])
    with pytest.raises(RecipeError, match="name its folder with cnn"):
        new(parts, feature_network="cnn")
