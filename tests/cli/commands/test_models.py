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


def test_what_a_file_is_that_is_no_whole_model(
    tiny_folder: Path, refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = tiny_folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert main(["models", str(unet), "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["models"]
    assert (part["kind"], part["dtypes"]) == ("unet", {"F16": part["tensors"]})
    assert part["parameters"] * 2 < unet.stat().st_size
    assert main(["models", str(unet)]) == 0
    assert "unet" in capsys.readouterr().out
    (tmp_path / "short.safetensors").write_bytes(unet.read_bytes()[:-1])
    assert "is truncated" in refused("models", tmp_path / "short.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    assert "is a pickle" in refused("models", tmp_path / "pickle.safetensors")


def test_a_preset_changes_what_is_said(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(tiny_folder), "--preset", "lcm", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert (model["preset"], model["num_inference_steps"], model["timestep_spacing"]) == ("lcm", 4, "lcm")
