from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onestill.errors import CheckpointError
from onestill.networks.text_encoder import open_text_encoder
from tests.train.models import TOKENS, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("sd15", "sdxl"):
        write_model(folder / family, family)
    return folder


def test_towers_are_opened_by_what_the_folder_holds(models: Path) -> None:
    one, two = (open_text_encoder(str(models / family)) for family in ("sd15", "sdxl"))
    assert (len(one.towers), len(two.towers)) == (1, 2)
    assert one(["a star"]).text.shape == (1, TOKENS, 16)
    assert two(["a star"]).text.shape == (1, TOKENS, 16 + 24)
    assert one.embed(["a star", ""]).shape == (2, one.width)
    second = open_text_encoder(str(models / "sdxl"), parts=("_2",))
    assert second.embed(["a star"]).shape == (1, second.width) == (1, 20)
    torch.testing.assert_close(second.embed(["a star"]), two(["a star"]).pooled)
    assert not any(p.requires_grad for p in second.towers[0].parameters())


def test_folders_that_hold_no_tower(models: Path) -> None:
    with pytest.raises(CheckpointError, match="no text encoder"):
        open_text_encoder("nothing_of_this_name")
    with pytest.raises((CheckpointError, OSError, ValueError)):
        open_text_encoder(str(models / "sd15/unet"))
