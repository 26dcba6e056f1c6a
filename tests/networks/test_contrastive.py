from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onestill.errors import CheckpointError
from onestill.networks.contrastive import ContrastiveModel, new_backbone, tokens
from tests.tiny import WIDTH


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_tower_is_saved_whole(tmp_path: Path, kind: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    backbone = new_backbone(kind, channels=3, size=32, patch=8, width=32, depth=1)
    tower = ContrastiveModel(backbone, 16, WIDTH, {"space": "pixels", "image_size": 32})
    tower.embed_image(x)  # moves the statistics that a ResNet keeps
    tower.eval().save(tmp_path / "tower")
    loaded = ContrastiveModel.load(tmp_path / "tower")
    assert loaded.space == "pixels"
    assert loaded.facts["image_size"] == 32
    assert torch.equal(loaded.embed_image(x), tower.embed_image(x))
    text, mask = torch.randn(2, 5, WIDTH), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(loaded.embed_text(text, mask), tower.embed_text(text, mask))
    torch.testing.assert_close(loaded.embed_image(x).norm(dim=-1), torch.ones(2))
    assert loaded.logit_scale == tower.logit_scale


def test_what_is_no_contrastive_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no contrastive model"):
        ContrastiveModel.load(tmp_path)
    backbone = new_backbone("resnet", channels=3, size=32, patch=1, width=32, depth=1)
    for name in ("projections.safetensors", "image_tower/model.safetensors", "contrastive.json"):
        folder = tmp_path / name.replace("/", "-")
        ContrastiveModel(backbone, 16, WIDTH).save(folder)
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
        with pytest.raises(CheckpointError, match="holds no contrastive model"):
            ContrastiveModel.load(folder)


def test_a_class_token_is_no_place_on_the_grid() -> None:
    assert tokens(torch.arange(5.0).view(1, 5, 1)).flatten().tolist() == [1, 2, 3, 4]
    assert tokens(torch.arange(4.0).view(1, 1, 2, 2)).flatten().tolist() == [0, 1, 2, 3]
