from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from onestill.errors import CheckpointError
from onestill.networks.latents import LatentSpace, to_uint8
from onestill.pixels import to_images, to_pictures
from tests.tiny import tiny_autoencoder, tiny_kl
from tests.train.models import SIDE, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "sd15", "sd15")
    tiny_autoencoder().save_pretrained(folder / "tiny-vae")
    tiny_kl().save_pretrained(folder / "kl")
    return folder


def test_a_tiny_decoder_stands_in_for_the_autoencoders(models: Path) -> None:
    space = LatentSpace.load(models / "sd15/vae", models / "tiny-vae")
    assert space.factor == 8
    latents = torch.randn(5, 4, SIDE, SIDE)
    expected = space.decoder.decode(latents / space.decoder.config.scaling_factor).sample
    torch.testing.assert_close(space.decode(latents), expected)
    assert space.pictures(latents).shape == (5, 32, 32, 3)
    own = LatentSpace.load(models / "sd15/vae")
    assert not torch.allclose(own.decode(latents), expected)
    torch.testing.assert_close(own.encode(own.decode(latents)), space.encode(own.decode(latents)))


def test_a_decoder_of_other_latents_is_refused(models: Path, tmp_path: Path) -> None:
    AutoencoderTiny(
        latent_channels=3, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="decodes other latents"):
        LatentSpace.load(models / "kl", tmp_path / "other")


def test_frozen_parts_may_compute_in_bfloat16(models: Path) -> None:
    space = LatentSpace.load(models / "kl").to(torch.device("cpu"), torch.bfloat16)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = space.encode(images)
    assert latents.dtype == space.decode(latents).dtype == torch.float32
    torch.testing.assert_close(latents, LatentSpace.load(models / "kl").encode(images), rtol=0.1, atol=0.1)


def test_tensors_become_the_pictures_that_arrays_become() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    assert (to_uint8(torch.from_numpy(to_images(levels))).numpy() == levels).all()
    images = torch.randn(2, 3, 5, 7)
    assert (to_uint8(images).numpy() == to_pictures(images.numpy())).all()
    assert to_uint8(torch.full((1, 3, 1, 1), 9.0)).max() == 255
