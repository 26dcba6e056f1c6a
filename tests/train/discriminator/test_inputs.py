from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onestill.errors import RecipeError
from onestill.train.discriminator.inputs import InputTransform
from onestill.train.methods.add import Method
from onestill.train.noise import Draw
from tests.train.parts import CHANNELS, SIZE, add_method, condition, latents_batch, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def new(parts: Path, seed: int = 0, **options: Any) -> tuple[Method, InputTransform, Tensor]:
    method = add_method(parts, **options)
    latents = latents_batch()["latents"]
    return method, method.inputs.draw(latents, Draw(torch.Generator().manual_seed(seed))), latents


def vit(parts: Path, **options: Any) -> dict[str, Any]:
    return {
        "features__network": "vit",
        "features__vit": str(parts / "dinov2"),
        "features__vit_layers": [0, 2],
        **options,
    }


def test_one_transform_shows_equal_latents_alike(parts: Path) -> None:
    method, transform, latents = new(
        parts,
        **vit(
            parts, features__vit_size=8, discriminator_input__crop=2, discriminator_input__augment=["colour", "cutout"]
        ),
    )
    told = condition(latents_batch())
    for mine, same in zip(transform.features(latents, told), transform.features(latents.clone(), told), strict=True):
        assert torch.equal(mine, same)
    other = method.inputs.draw(latents, Draw(torch.Generator().manual_seed(1)))
    assert not torch.equal(transform.features(latents, told)[0], other.features(latents, told)[0])


def test_a_crop_decodes_a_window_alone_and_once(parts: Path) -> None:
    method, transform, latents = new(parts, **vit(parts, features__vit_size=8, discriminator_input__crop=2))
    row, column, *sides = transform._window
    assert sides == [2, 2]
    expected = method.space.decode(latents[:, :, row : row + 2, column : column + 2])
    torch.testing.assert_close(transform.pixels(latents), expected)
    assert transform.pixels(latents) is transform.pixels(latents)
    windows = {
        new(parts, seed, **vit(parts, features__vit_size=8, discriminator_input__crop=2))[1]._window[:2]
        for seed in range(6)
    }
    assert len(windows) > 1


def test_a_vit_is_shown_a_window_of_its_own_size_as_often_as_said(parts: Path) -> None:
    for share, often in ((0.0, [False] * 4), (1.0, [True] * 4)):
        transforms = [
            new(parts, seed, **vit(parts, features__vit_size=16, features__vit_crop=share))[1] for seed in range(4)
        ]
        assert [transform._corner is not None for transform in transforms] == often
        assert transforms[0]._seen(latents_batch()["latents"]).shape[-1] == (16 if share else 32)


def test_latents_are_rolled_and_pictures_decoded(parts: Path) -> None:
    _, transform, latents = new(parts, features__network="tower", discriminator_input__shift=1)
    assert torch.equal(transform._seen(latents), torch.roll(latents, transform._shift, (2, 3)))
    _, transform, _ = new(
        parts, features__network="tower", features__tower=str(parts / "pixels"), discriminator_input__space="pixels"
    )
    assert transform._seen(latents).shape == (4, 3, 8 * SIZE, 8 * SIZE)


def test_one_more_head_sees_the_latents_as_they_are(parts: Path) -> None:
    plain, _, _ = new(parts, features__network="teacher")
    method, transform, latents = new(parts, features__network="teacher", features__latents_too=True)
    assert method.inputs.widths == [*plain.inputs.widths, CHANNELS]
    last = transform.features(latents, condition(latents_batch()))[-1]
    assert torch.equal(last, torch.roll(latents, transform._shift, (2, 3)).flatten(2).transpose(1, 2))


def test_noise_levels_lie_where_the_recipe_says(parts: Path) -> None:
    method, transform, latents = new(
        parts, features__network="teacher", discriminator_input__t_low=100, discriminator_input__t_high=110
    )
    assert transform.timesteps.min() >= 100
    assert transform.timesteps.max() <= 110
    assert latents.shape == (4, CHANNELS, SIZE, SIZE)
    assert method.inputs.embed(latents).shape == (4, method.inputs.image_encoder.embedding_width)


def test_a_cnn_sees_pictures_and_needs_a_folder(parts: Path) -> None:
    method, transform, latents = new(
        parts, features__network="cnn+teacher", features__cnn=str(parts / "lite0"), discriminator_input__shift=0
    )
    first, *_ = transform.features(latents, condition(latents_batch()))
    torch.testing.assert_close(first, method.inputs.networks[0].features(method.space.decode(latents))[0])
    with pytest.raises(RecipeError, match=r"name its folder with features\.cnn"):
        new(parts, features__network="cnn")
