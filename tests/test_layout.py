"""Our names of the original key layout against diffusers' own converters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file

from onestill.checkpoint import describe
from onestill.checkpoint.single_file import OPEN_CLIP_PREFIXES, networks
from onestill.networks.load import load_components
from tests.tiny_sd import FAMILIES, single_file, tiny_sd


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_means_to_diffusers_what_it_means_to_us(family: str, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "folder", family)
    path = single_file(folder, tmp_path / "model.safetensors", family)
    whole = load_file(path)
    parts = load_components(describe(folder))
    converted = {
        "unet": convert_ldm_unet_checkpoint(dict(whole), dict(parts["unet"].config)),
        "vae": convert_ldm_vae_checkpoint(dict(whole), dict(parts["vae"].config)),
    }
    if family == "sdxl":
        second = parts["text_encoder_2"]
        converted["text_encoder_2"] = convert_open_clip_checkpoint(second, dict(whole), prefix=OPEN_CLIP_PREFIXES[0])
        converted["text_encoder_2"].pop("text_model.embeddings.position_ids", None)
    for component, state in converted.items():
        expected = parts[component].state_dict()
        assert set(state) == set(expected), component
        for name, value in expected.items():
            torch.testing.assert_close(state[name].reshape(value.shape), value, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_read_from_shapes_are_the_folders(family: str, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "folder", family)
    _, found = networks(single_file(folder, tmp_path / "model.safetensors", family))
    parts = load_components(describe(folder))
    for component, network in found.items():
        config = parts[component].config
        ignored = {"eos_token_id", "bos_token_id", "pad_token_id", "sample_size"}
        if family == "sd21":
            ignored |= {"projection_dim"}  # of a projection that nothing uses
        for name in set(network.config) - ignored:
            expected = getattr(config, name)
            if name in ("transformer_layers_per_block", "attention_head_dim") and isinstance(expected, int):
                value = network.config[name]
                assert value == expected or set(value) == {expected}, (component, name)
                continue
            value = network.config[name]
            assert (list(value) if isinstance(value, list) else value) == (
                list(expected) if isinstance(expected, tuple | list) else expected
            ), (component, name)
