from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from onestill.errors import CheckpointError
from onestill.evaluate import load_network
from onestill.text.tokenize import PromptTokenizer
from tests.on_cpu import load_engine

TEXT_WIDTH, WIDTH = 32, 8


def backbone(kind: str) -> torch.nn.Module:
    if kind == "vit":
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = AutoConfig.for_model("vit", image_size=32, patch_size=8, **shape)
        return AutoModel.from_config(config, add_pooling_layer=False)
    shape = {"embedding_size": 4, "hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1]}
    return AutoModel.from_config(AutoConfig.for_model("resnet", layer_type="basic", **shape))


def contrastive(folder: Path, kind: str = "vit", **facts: object) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone(kind).save_pretrained(folder / "image_tower")
        heads = {
            "image_projection.weight": torch.randn(WIDTH, 16),
            "text_projection.weight": torch.randn(WIDTH, TEXT_WIDTH),
        }
    save_file({**heads, "logit_scale": torch.tensor(2.66)}, folder / "projections.safetensors")
    (folder / "contrastive.json").write_text(json.dumps({"image_size": 32, "embedding_dim": WIDTH, **facts}))
    return folder


def pictures(count: int = 3, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_features_are_the_mean_of_the_last_tokens(tmp_path: Path, tiny_folder: Path, kind: str) -> None:
    network = load_network(contrastive(tmp_path, kind), tiny_folder, batch_size=2)
    found = network.features(pictures())
    tower = AutoModel.from_pretrained(tmp_path / "image_tower").eval()
    image = torch.from_numpy(pictures()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        state = tower(pixel_values=image).last_hidden_state
    pooled = state[:, 1:].mean(1) if kind == "vit" else state.flatten(2).mean(2)
    np.testing.assert_allclose(found, pooled.numpy(), atol=1e-5)
    assert network.embed(found).shape == (3, WIDTH)


def test_other_sizes_are_resized(tmp_path: Path, tiny_folder: Path) -> None:
    network = load_network(contrastive(tmp_path), tiny_folder)
    flat = np.full((1, 32, 32, 3), 90, np.uint8)
    large = np.full((1, 80, 80, 3), 90, np.uint8)
    np.testing.assert_allclose(network.features(flat), network.features(large), atol=1e-5)


def test_captions_are_pooled_over_their_own_tokens(tmp_path: Path, tiny_folder: Path) -> None:
    network = load_network(contrastive(tmp_path), tiny_folder, batch_size=2)
    captions = ["a red apple", "a blue star icon on green", "a red apple", "heart"]
    found = network.texts(captions)
    engine = load_engine("torch", tiny_folder)
    states = engine.encode(captions).states
    mask = PromptTokenizer(engine.info)(captions).mask[..., None]
    projection = np.asarray(torch.nn.Parameter(_text_projection(tmp_path)).detach())
    np.testing.assert_allclose(found, (states * mask).sum(1) / mask.sum(1) @ projection.T, atol=1e-4)
    assert (found[0] == found[2]).all()


def _text_projection(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "projections.safetensors")["text_projection.weight"]


def test_weights_name_themselves(tmp_path: Path, tiny_folder: Path) -> None:
    first = load_network(contrastive(tmp_path / "a"), tiny_folder)
    second = load_network(contrastive(tmp_path / "b", "resnet"), tiny_folder)
    assert first.name == "a"
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == load_network(tmp_path / "a", tiny_folder).fingerprint


def test_other_folders_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no contrastive model"):
        load_network(tiny_folder, tiny_folder)
    with pytest.raises(CheckpointError, match="trained on latents"):
        load_network(contrastive(tmp_path, space="latents"), tiny_folder)
    with pytest.raises(CheckpointError, match="no image_size"):
        load_network(contrastive(tmp_path / "size", image_size="wide"), tiny_folder)
    (tmp_path / "image_tower" / "model.safetensors").write_bytes(b"broken")
    (tmp_path / "contrastive.json").write_text('{"image_size": 32}')
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load_network(tmp_path, tiny_folder).features(pictures())
