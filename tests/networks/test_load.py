"""Weights as modules, from folders and single files: the same tensors that diffusers loads."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from onestill.checkpoint import Additions, describe, identify
from onestill.checkpoint.single_file import OPEN_CLIP_PREFIXES
from onestill.errors import CheckpointError, ModelNotFoundError
from onestill.networks.load import load_components
from onestill.pipeline import Pipeline
from tests.on_cpu import load
from tests.original_layout import place_of
from tests.tiny import tiny_autoencoder
from tests.tiny_sd import FAMILIES, UNET_PREFIX, single_file, tiny_sd

PROMPT = "a red apple on a table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl")


def levels(pipe: Pipeline, **settings: Any) -> Any:
    return np.asarray(pipe(PROMPT, seed=1, **settings).images[0], dtype=np.int16)


@pytest.mark.parametrize("end", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("prefix", [UNET_PREFIX, "conditioner.embedders.0.", "conditioner.embedders.1."])
def test_scaled_fp8_is_multiplied_out_in_every_part(folder: Path, prefix: str, end: str, tmp_path: Path) -> None:
    whole = load_file(single_file(folder, tmp_path / "model.safetensors", "sdxl"))
    scaled, expected = dict(whole), dict(whole)
    for name, value in whole.items():
        if name.startswith(prefix) and value.ndim == 2 and name.endswith("weight") and "embedding" not in name:
            by_row = value.abs().amax(1, keepdim=True) / 448
            scale = by_row if "mlp" in name else by_row.max().reshape(())  # of a row, or of all
            scaled[name] = (value / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix(".weight") + end] = scale
            expected[name] = scaled[name].float() * scale
    scaled["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    for name, tensors in (("scaled", scaled), ("expected", expected)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    found, known = (load_components(describe(tmp_path / f"{name}.safetensors")) for name in ("scaled", "expected"))
    for component, module in known.items():
        for name, value in module.state_dict().items():
            assert torch.equal(found[component].state_dict()[name], value), name


def test_quantized_weights_and_unknown_tensors_are_refused_in_every_part(folder: Path, tmp_path: Path) -> None:
    path = single_file(folder, tmp_path / "model.safetensors", "sdxl")
    whole = load_file(path)
    clip = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1"
    for prefix in ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.", UNET_PREFIX):
        save_file(whole | {f"{prefix}mystery.weight": torch.zeros(1)}, path)
        with pytest.raises(CheckpointError, match=r"has 1 tensors \('.*mystery.weight'\) that no"):
            load_components(describe(path))
    integers = {f"{clip}.weight": whole[f"{clip}.weight"].to(torch.int8)}
    for more in ({}, {f"{clip}.SCB": torch.ones(4)}, {f"{clip}.weight_scale": torch.ones(())}):
        save_file(whole | integers | more, path)
        with pytest.raises(CheckpointError, match="holds quantized weights"):
            load_components(describe(path))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (weights,) = (copy / "text_encoder").glob("*.safetensors")
    state = load_file(weights)
    save_file(state | {"text_model.encoder.layers.0.mlp.fc1.scale_weight": torch.ones(())}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds quantized weights \('.*scale_weight'\)"):
        load_components(describe(copy))


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
def test_a_single_file_holds_what_its_folder_and_diffusers_own_loader_do(family: str, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "folder", family)
    path = single_file(folder, tmp_path / "model.safetensors", family)
    loaded = {name: part.state_dict() for name, part in load_components(describe(path)).items()}
    expected = {name: part.state_dict() for name, part in load_components(describe(folder)).items()}
    classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for name, kind in classes.items():
        theirs = kind.from_single_file(str(path), config=str(folder), subfolder=name, local_files_only=True)
        torch.testing.assert_close(theirs.state_dict(), expected[name], rtol=0, atol=0)
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_a_unet_that_embeds_the_guidance_scale_is_read_in_both_layouts(folder: Path, tmp_path: Path) -> None:
    config = diffusers.UNet2DConditionModel.load_config(folder / "unet") | {"time_cond_proj_dim": 32}
    unet = diffusers.UNet2DConditionModel.from_config(config)
    state = unet.state_dict()
    place = place_of("unet", config, state)
    for layout, prefix in (("diffusers", ""), ("original", ""), ("original", UNET_PREFIX)):
        names = {name: name if layout == "diffusers" else place(name).name for name in state}  # type: ignore[union-attr]
        save_file({prefix + names[name]: value for name, value in state.items()}, tmp_path / "unet.safetensors")
        info = describe(folder, Additions(unet=tmp_path / "unet.safetensors"))
        assert info.embeds_guidance
        found = load_components(info, only=["unet"])["unet"].state_dict()
        torch.testing.assert_close(found, state, rtol=0, atol=0)
