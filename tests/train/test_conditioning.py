from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onestill.errors import CheckpointError
from onestill.train.conditioning import (
    Condition,
    LatentSpace,
    TextEncoder,
    TwoTextEncoders,
    batch_condition,
    joined,
    open_text_encoder,
)
from tests.tiny import tiny_autoencoder, tiny_kl
from tests.train.models import SIDE, TOKENS, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("sd15", "sdxl"):
        write_model(folder / family, family)
    tiny_autoencoder().save_pretrained(folder / "tiny-vae")
    tiny_kl().save_pretrained(folder / "kl")
    return folder


def condition(count: int, value: float = 1.0) -> Condition:
    mask = torch.ones(count, 3, dtype=torch.bool)
    return Condition(
        torch.full((count, 3, 4), value), mask, torch.full((count, 5), value), torch.full((count, 6), value)
    )


def test_dropped_prompts_become_the_empty_one_and_keep_their_sizes() -> None:
    mixed = condition(3).where(torch.tensor([False, True, False]), condition(1, 7.0))
    assert mixed.text[:, 0, 0].tolist() == [1, 7, 1]
    assert mixed.pooled is not None
    assert mixed.pooled[:, 0].tolist() == [1, 7, 1]
    assert mixed.sizes is not None
    assert mixed.sizes[:, 0].tolist() == [1, 1, 1]


def test_two_conditions_one_after_the_other() -> None:
    both = joined(condition(2), condition(1, 7.0).expand(2))
    assert both.text[:, 0, 0].tolist() == [1, 1, 7, 7]
    assert both.added["added_cond_kwargs"]["text_embeds"].shape == (4, 5)
    plain = Condition(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    assert joined(plain, plain).added == {}
    assert condition(1, 7.0).sized(condition(1)).sizes.tolist() == [[1.0] * 6]  # type: ignore[union-attr]


def test_an_embedding_is_the_pooled_one_or_the_mean_of_what_is_no_padding() -> None:
    assert condition(2).embedding.shape == (2, 5)
    text, mask = torch.tensor([[[1.0], [3.0], [50.0]]]), torch.tensor([[True, True, False]])
    assert Condition(text, mask).embedding.tolist() == [[2.0]]


def test_a_batch_without_sizes_is_of_whole_pictures() -> None:
    batch = {"text": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3), "pooled": torch.zeros(2, 5)}
    told = batch_condition(batch, torch.device("cpu"), 512)
    assert told.sizes is not None
    assert told.sizes.tolist() == [[512, 512, 0, 0, 512, 512]] * 2


def test_towers_are_opened_by_what_the_folder_holds(models: Path) -> None:
    one, two = (open_text_encoder(str(models / family)) for family in ("sd15", "sdxl"))
    assert isinstance(one, TextEncoder)
    assert isinstance(two, TwoTextEncoders)
    assert one(["a star"]).text.shape == (1, TOKENS, 16)
    assert two(["a star"]).text.shape == (1, TOKENS, 16 + 24)
    assert one.embed(["a star", ""]).shape == (2, one.width)
    second = TextEncoder(str(models / "sdxl"), part="_2")
    assert second.embed(["a star"]).shape == (1, second.width) == (1, 20)
    torch.testing.assert_close(second.embed(["a star"]), two(["a star"]).pooled)
    assert not any(p.requires_grad for p in second.model.parameters())


def test_folders_that_hold_no_tower(models: Path) -> None:
    with pytest.raises(CheckpointError, match="no text encoder"):
        TextEncoder("nothing_of_this_name")
    with pytest.raises((CheckpointError, OSError, ValueError)):
        TextEncoder(str(models / "sd15/unet"))


def test_a_tiny_decoder_stands_in_for_the_autoencoders(models: Path) -> None:
    space = LatentSpace(models / "sd15/vae", models / "tiny-vae")
    assert space.factor == 8
    latents = torch.randn(5, 4, SIDE, SIDE)
    expected = space.decoder.decode(latents / space.decoder.config.scaling_factor).sample
    torch.testing.assert_close(space.decode(latents), expected)
    assert space.pictures(latents).shape == (5, 32, 32, 3)
    own = LatentSpace(models / "sd15/vae")
    assert not torch.allclose(own.decode(latents), expected)
    torch.testing.assert_close(own.encode(own.decode(latents)), space.encode(own.decode(latents)))


def test_a_decoder_of_other_latents_is_refused(models: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        latent_channels=3, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="decodes other latents"):
        LatentSpace(models / "kl", tmp_path / "other")


def test_frozen_parts_may_compute_in_bfloat16(models: Path) -> None:
    space = LatentSpace(models / "kl").to(torch.device("cpu"), torch.bfloat16)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = space.encode(images)
    assert latents.dtype == space.decode(latents).dtype == torch.float32
    torch.testing.assert_close(latents, LatentSpace(models / "kl").encode(images), rtol=0.1, atol=0.1)
