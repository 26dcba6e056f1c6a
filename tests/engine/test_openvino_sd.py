"""SD and SDXL in OpenVINO's form against torch, at tiny width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from onestill.checkpoint import describe, verify
from onestill.cli import main
from onestill.engine.export_sd import export_sd
from onestill.errors import CheckpointError, OnestillError
from onestill.pipeline import Pipeline, load
from tests.tiny import tiny_autoencoder
from tests.tiny_sd import FAMILIES, single_file, tiny_sd

PROMPTS = ["a red apple", "a green heart"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = str(request.param)
    return tiny_sd(tmp_path_factory.mktemp("models") / family, family, dtype=torch.float16)


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_sd(describe(folder), tmp_path_factory.mktemp("exported") / folder.name)


def levels(pipe: Pipeline, **settings: Any) -> Any:
    return np.stack([np.asarray(image, dtype=np.int16) for image in pipe(PROMPTS, seed=3, **settings).images])


def test_it_draws_what_torch_draws(folder: Path, exported: Path) -> None:
    slow, quick = load(folder), load(exported, dtype="float32")
    assert (quick.engine.name, slow.engine.name) == ("openvino", "torch")
    assert quick.info.timesteps(4) == slow.info.timesteps(4)
    image = PIL.Image.new("RGB", (64, 64), "orange")
    for settings in (
        {},
        {"num_inference_steps": 2, "guidance_scale": 2.0},
        {"num_inference_steps": 2, "image": image, "strength": 0.5},
        {"num_inference_steps": 1, "height": 96, "width": 64},
        {"num_inference_steps": 1},
    ):
        difference = np.abs(levels(slow, **settings) - levels(quick, **settings))
        assert difference.max() <= 2, settings


def test_bfloat16_is_near(folder: Path, exported: Path) -> None:
    difference = np.abs(levels(load(folder)) - levels(load(exported, dtype="bfloat16")))
    assert difference.mean() < 4


def test_int8_weights_are_half_as_large_and_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_sd(tmp_path / "xl", "sdxl", dtype=torch.float16)
    monkeypatch.setattr("onestill.engine.export_sd.SMALLEST_INT8", 2**10)
    small = export_sd(describe(folder), tmp_path / "int8", weights="int8")
    (half,) = (folder / "unet").glob("*.safetensors")
    assert (small / "openvino" / "unet.bin").stat().st_size < 0.65 * half.stat().st_size
    difference = np.abs(levels(load(folder)) - levels(load(small, dtype="float32")))
    assert 0 < difference.mean() < 4
    with pytest.raises(OnestillError, match="choose from float16, int8"):
        export_sd(describe(folder), tmp_path / "x", weights="int3")


def test_a_single_file_with_a_tiny_decoder_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_sd(tmp_path / "xl", "sdxl")
    file = single_file(folder, tmp_path / "model.safetensors", "sdxl", notes={"modelspec.resolution": "64x64"})
    torch.manual_seed(0)
    tiny = tiny_autoencoder()
    tiny.register_to_config(scaling_factor=1.0)
    tiny.save_pretrained(tmp_path / "taesdxl")
    out = tmp_path / "out"
    options = ["--model", str(file), "--tiny-vae", str(tmp_path / "taesdxl"), "--out", str(out)]
    assert main(["export", *options]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    expected = levels(load(file, tiny_vae=tmp_path / "taesdxl"))
    assert np.abs(levels(load(out, dtype="float32")) - expected).max() <= 2
    assert not list(out.rglob("*.safetensors"))
    (out / "openvino" / "unet.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"unet\.bin' has 5 of"):
        verify(out)
