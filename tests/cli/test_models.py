from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from onestill import list_models
from onestill.cli import main

Refused = Callable[..., str]


def test_shipped_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    assert [model["name"] for model in json.loads(capsys.readouterr().out)["models"]] == list_models()
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in list_models())


def test_one_model_is_described(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(tiny_folder), "--check", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["name"], model["width"], model["height"], model["latent_shape"]) == ("tiny", 32, 32, [4, 4, 4])
    assert main(["models", str(tiny_folder)]) == 0
    assert "v_prediction" in capsys.readouterr().out


def test_check_finds_a_changed_file(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "changed"))
    card = folder / "tokenizer" / "tokenizer.json"
    card.write_bytes(card.read_bytes().replace(b"apple", b"maple"))
    assert str(card) in refused("models", folder, "--check")


def test_an_unknown_model_is_one_line(refused: Refused) -> None:
    assert "no model named" in refused("models", "no-such-model")
