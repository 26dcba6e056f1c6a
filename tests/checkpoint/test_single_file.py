"""What a single safetensors file is, by the names and shapes of its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onestill.checkpoint import Additions, describe, identify
from onestill.checkpoint.single_file import UNET_PREFIX, component_files
from onestill.cli import main
from onestill.errors import CheckpointError
from onestill.networks.load import load_components
from tests.lora_files import lora_pairs, write_lora
from tests.on_cpu import load
from tests.tiny import tiny_autoencoder
from tests.tiny_sd import FAMILIES, single_file, tiny_sd


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Any:
    return lora_pairs(load_components(describe(folder)))


@pytest.fixture(scope="module")
def lora(folder: Path, pairs: Any) -> Path:
    return write_lora(folder.parent / "lora.safetensors", pairs, "peft")


def test_what_a_file_is(folder: Path, lora: Path, tmp_path: Path) -> None:
    path = single_file(folder, tmp_path / "sdxl_base.safetensors", "sdxl")
    kinds = {
        path: "checkpoint",
        lora: "lora",
        folder / "unet" / "diffusion_pytorch_model.safetensors": "unet",
        folder / "vae" / "diffusion_pytorch_model.safetensors": "autoencoder",
        folder / "text_encoder" / "model.safetensors": "text encoder",
    }
    assert {file: identify(file).kind for file in kinds} == kinds
    found = identify(path)
    assert (found.dtypes, found.tensors > 100) == ({"F32": found.tensors}, True)
    with pytest.raises(CheckpointError, match="is a LoRA; give it with --lora"):
        load(lora)
    with pytest.raises(CheckpointError, match="kind: autoencoder"):
        load(folder / "vae" / "diffusion_pytorch_model.safetensors")


def test_the_command_says_what_a_file_is(folder: Path, lora: Path, tmp_path: Path, capsys: Any) -> None:
    path = single_file(folder, tmp_path / "base.safetensors", "sdxl", notes={"modelspec.resolution": "64x64"})
    assert main(["models", str(path), "--json"]) == 0
    (whole,) = json.loads(capsys.readouterr().out)["models"]
    assert (whole["family"], whole["num_inference_steps"], whole["timestep_spacing"]) == (
        "stable-diffusion-xl",
        1,
        "trailing",
    )
    assert (whole["dtypes"], whole["notes"]) == ({"F32": whole["tensors"]}, {"modelspec.resolution": "64x64"})
    assert main(["models", str(lora), "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["models"]
    assert (part["kind"], part["tensors"] > 0) == ("lora", True)


def test_a_single_file_that_lacks_something_says_what(folder: Path, tmp_path: Path) -> None:
    path = single_file(folder, tmp_path / "model.safetensors", "sdxl")
    whole = load_file(path)

    def without(part: str) -> None:
        save_file({name: value for name, value in whole.items() if part not in name}, path)

    without("embedders.1")
    with pytest.raises(CheckpointError, match="no text_encoder_2"):
        load(path)
    without("first_stage_model.encoder")
    with pytest.raises(CheckpointError, match="no whole autoencoder"):
        load(path)
    without("input_blocks.0.0.weight")
    with pytest.raises(CheckpointError, match="no whole UNet"):
        load(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        load(path)


def test_what_is_for_another_family_is_refused_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    theirs = tiny_sd(tmp_path / "sd21", "sd21")
    with pytest.raises(CheckpointError, match=r"cross_attention_dim 64 where that of 'xl' has 128.*another family"):
        describe(folder, Additions(unet=theirs / "unet"))
    tiny_autoencoder(latent_channels=16).save_pretrained(tmp_path / "taesd3")
    with pytest.raises(CheckpointError, match=r"takes 16 channels where 'xl' has 4.*another family"):
        describe(folder, Additions(tiny_vae=tmp_path / "taesd3"))


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_read_from_shapes_are_the_folders(family: str, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "folder", family)
    _, found = component_files(single_file(folder, tmp_path / "model.safetensors", family))
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


MARKED = {
    "v": ({"v_pred": torch.zeros(0)}, "v_prediction", "euler"),
    "v at zero terminal SNR": ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, "v_prediction", "euler"),
    "edm": (
        {"edm_mean": torch.ones(1, 4, 1, 1), "edm_std": torch.full((1, 4, 1, 1), 2.0)},
        "epsilon",
        "EDMDPMSolverMulti",
    ),
    "edm-v": ({"edm_vpred.sigma_max": torch.tensor(120.0)}, "v_prediction", "EDMEuler"),
}


@pytest.mark.parametrize("kind", MARKED)
def test_markers_say_how_a_single_file_is_drawn(folder: Path, kind: str, tmp_path: Path) -> None:
    markers, prediction_type, sampler = MARKED[kind]
    path = single_file(folder, tmp_path / "model.safetensors", "sdxl")
    save_file(load_file(path) | markers, path)
    info = describe(path)
    assert info.schedule.prediction_type == prediction_type
    assert info.sampler.startswith(sampler)
    assert (info.preset, info.num_inference_steps, info.height) == ("", 25, 1024)
    assert bool(info.schedule.alphas_cumprod[-1] == 0) == ("zero" in kind)
    if kind == "edm":
        assert (info.latents_mean, info.latents_std, info.scaling_factor) == ((1.0,) * 4, (2.0,) * 4, 0.5)
    by_hand = describe(path, Additions(schedule="eps"))
    assert (by_hand.schedule.prediction_type, by_hand.scheduler, by_hand.preset) == ("epsilon", {}, "turbo")
    unet = {name: value for name, value in load_file(path).items() if name.startswith(UNET_PREFIX)}
    save_file(unet | markers, tmp_path / "unet.safetensors")
    assert describe(folder, Additions(unet=tmp_path / "unet.safetensors")).schedule.prediction_type == prediction_type


@pytest.mark.parametrize(("spread", "prediction_type"), [(0.02, "epsilon"), (0.3, "v_prediction")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stable_diffusion_2_predicts_v_by_the_spread_of_a_bias(
    spread: float, prediction_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = single_file(tiny_sd(tmp_path / "sd21", "sd21"), tmp_path / "model.safetensors", "sd21")
    whole = load_file(path)
    name = max(name for name in whole if "output_blocks" in name and name.endswith("transformer_blocks.0.norm1.bias"))
    whole[name] = torch.linspace(-1, 1, len(whole[name]), dtype=dtype) * spread
    save_file(whole, path)
    info = describe(path)
    assert info.schedule.prediction_type == prediction_type
    assert (info.sampler, info.height) == (("DDIMScheduler", 768) if spread > 0.09 else ("euler", 512))
