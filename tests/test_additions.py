"""What is put on top of a model: LoRAs, another UNet, a tiny decoder, a preset."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from onestill.checkpoint import Additions, describe, identify
from onestill.checkpoint.presets import PRESETS
from onestill.cli import main
from onestill.errors import CheckpointError, ModelNotFoundError, OnestillError
from onestill.networks.load import load_components
from onestill.pipeline import Pipeline
from tests.checkpoint_files import lora_pairs, write_lora
from tests.on_cpu import load
from tests.tiny import tiny_autoencoder
from tests.tiny_sd import UNET_PREFIX, single_file, tiny_sd

PROMPT = "a red apple on a table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Any:
    return lora_pairs(load_components(describe(folder)))


@pytest.fixture(scope="module")
def lora(folder: Path, pairs: Any) -> Path:
    return write_lora(folder.parent / "lora.safetensors", pairs, "peft")


def levels(pipe: Pipeline, **settings: Any) -> Any:
    return np.asarray(pipe(PROMPT, seed=1, **settings).images[0], dtype=np.int16)


# --- another UNet, a tiny decoder, presets ---


def test_another_unet_of_either_layout(folder: Path, tmp_path: Path) -> None:
    (weights,) = (folder / "unet").glob("*.safetensors")
    changed = {name: value * (1.1 if name == "conv_out.weight" else 1) for name, value in load_file(weights).items()}
    save_file(changed, tmp_path / "student.safetensors")
    whole = load_file(single_file(folder, tmp_path / "model.safetensors", "sdxl"))
    only = {name: value for name, value in whole.items() if name.startswith(UNET_PREFIX)}
    only[f"{UNET_PREFIX}out.2.weight"] = only[f"{UNET_PREFIX}out.2.weight"] * 1.1
    save_file(only, tmp_path / "original.safetensors")
    drawn = [levels(load(folder, unet=tmp_path / f"{name}.safetensors")) for name in ("student", "original")]
    np.testing.assert_array_equal(*drawn)
    assert np.abs(drawn[0] - levels(load(folder))).max() > 1
    with pytest.raises(CheckpointError, match="give it with --unet"):
        load(tmp_path / "original.safetensors")
    del only[f"{UNET_PREFIX}input_blocks.1.0.in_layers.0.weight"]
    save_file(only, tmp_path / "original.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors \('down_blocks"):
        load(folder, unet=tmp_path / "original.safetensors")
    save_file({**changed, "mystery.weight": torch.zeros(1)}, tmp_path / "student.safetensors")
    with pytest.raises(CheckpointError, match=r"has 1 tensors \('mystery.weight'\) that no"):
        load(folder, unet=tmp_path / "student.safetensors")


def test_what_is_for_another_family_is_refused_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    theirs = tiny_sd(tmp_path / "sd21", "sd21")
    with pytest.raises(CheckpointError, match=r"cross_attention_dim 64 where that of 'xl' has 128.*another family"):
        describe(folder, Additions(unet=theirs / "unet"))
    tiny_autoencoder(latent_channels=16).save_pretrained(tmp_path / "taesd3")
    with pytest.raises(CheckpointError, match=r"takes 16 channels where 'xl' has 4.*another family"):
        describe(folder, Additions(tiny_vae=tmp_path / "taesd3"))


def test_a_tiny_decoder_in_every_form_draws_what_diffusers_draws(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = tiny_autoencoder()
    tiny.register_to_config(scaling_factor=1.0)
    tiny.save_pretrained(tmp_path / "taesdxl")
    own = {name: value for name, value in tiny.state_dict().items() if name.startswith("decoder.layers.")}
    own = {f"{int(name.split('.')[2]) + 1}.{name.split('.', 3)[3]}": value for name, value in own.items()}
    save_file(own, tmp_path / "taesd_decoder.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), vae=tiny)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(1)
        image = pipe(PROMPT, num_inference_steps=1, guidance_scale=1.0, generator=generator).images[0]
    for given in (tmp_path / "taesdxl", tmp_path / "taesd_decoder.safetensors"):
        found = levels(load(folder, tiny_vae=given))
        assert np.abs(found - np.asarray(image, dtype=np.int16)).max() <= 1
    with pytest.raises(CheckpointError, match="no tiny autoencoder"):
        load(folder, tiny_vae=folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelNotFoundError, match="nothing at"):
        load(folder, tiny_vae=tmp_path / "gone")


def test_presets_say_how_a_student_draws(folder: Path) -> None:
    for name, preset in PRESETS.items():
        info = describe(folder, Additions(preset=name))
        assert (info.num_inference_steps, info.sampler, info.preset) == (
            preset.num_inference_steps,
            preset.sampler,
            name,
        )
    assert describe(folder, Additions(preset="dmd2")).timesteps(1) == [399]
    assert describe(folder, Additions(preset="lcm")).timesteps(4) == [999, 759, 499, 259]
    assert describe(folder, Additions(preset="lightning-x0")).schedule.prediction_type == "sample"
    assert describe(folder).preset == ""


@pytest.mark.parametrize(
    ("scheduler", "preset"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, "base"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}, "base"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "turbo"),
        ({"_class_name": "LCMScheduler"}, "lcm"),
    ],
)
def test_only_a_folder_that_says_so_draws_in_few_steps(
    folder: Path, tmp_path: Path, scheduler: dict[str, str], preset: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    info = describe(copy)
    assert (info.num_inference_steps, info.guidance_scale) == (
        PRESETS[preset].num_inference_steps,
        PRESETS[preset].guidance_scale,
    )


def test_an_unknown_preset_names_the_nearest(folder: Path) -> None:
    with pytest.raises(OnestillError, match="Did you mean 'turbo'"):
        describe(folder, Additions(preset="turboo"))


# --- what a file is ---


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


def test_a_file_of_mixed_types_draws_as_its_numbers_are(folder: Path, tmp_path: Path) -> None:
    path = single_file(folder, tmp_path / "model.safetensors", "sdxl", notes={"modelspec.resolution": "64x64"})
    whole = {name: value.half() for name, value in load_file(path).items()}
    mixed = {name: value.float() if i % 2 else value for i, (name, value) in enumerate(whole.items())}
    drawn = []
    for i, tensors in enumerate((whole, mixed)):
        save_file(tensors, tmp_path / f"{i}.safetensors", metadata={"modelspec.resolution": "64x64"})
        drawn.append(levels(load(tmp_path / f"{i}.safetensors")))
    assert set(identify(tmp_path / "1.safetensors").dtypes) == {"F16", "F32"}
    np.testing.assert_array_equal(*drawn)


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


def test_an_fp16_variant_in_shards_draws_the_same(tmp_path: Path) -> None:
    plain = tiny_sd(tmp_path / "plain", "sdxl", dtype=torch.float16)
    other = tiny_sd(tmp_path / "other", "sdxl", dtype=torch.float16, variant="fp16", max_shard_size="4MB")
    assert len(list((other / "unet").glob("*.fp16*-of-*"))) > 1
    np.testing.assert_array_equal(levels(load(plain, dtype="float32")), levels(load(other, dtype="float32")))
    shard = next((other / "unet").glob("*-of-*"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load(other)


def test_text_encoders_with_and_without_their_prefix(folder: Path, tmp_path: Path) -> None:
    path = single_file(folder, tmp_path / "model.safetensors", "sdxl", notes={"modelspec.resolution": "64x64"})
    expected = levels(load(path))
    start = "conditioner.embedders.0.transformer."
    short = {name.replace(f"{start}text_model.", start): value for name, value in load_file(path).items()}
    save_file(short, path, metadata={"modelspec.resolution": "64x64"})
    np.testing.assert_array_equal(levels(load(path)), expected)


def test_the_scheduler_config_decides_what_a_folder_is(folder: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(folder, tmp_path / "sdxl-turbo-by-name-only"))
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_spacing": "leading"}))
    info = describe(other)
    assert (info.num_inference_steps, info.guidance_scale, info.unit_noise) == (25, 5.0, True)
    assert describe(folder).num_inference_steps == 1
