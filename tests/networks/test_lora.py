"""LoRA files: every naming and every kind adds what diffusers and PEFT add."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file

from onestill.checkpoint import Additions, Lora, describe
from onestill.checkpoint.single_file import UNET_PREFIX
from onestill.errors import CheckpointError, ModelNotFoundError, UnsafeFormatError
from onestill.networks.load import load_components
from onestill.networks.lora.names import find_layer, layers_by_name, original_name
from onestill.pipeline import Pipeline
from tests.lora_files import ALPHA, RANK, lora_pairs, write_lora
from tests.on_cpu import load
from tests.tiny_sd import FAMILIES, single_file, tiny_sd, tiny_unet

PROMPT = "a red apple on a table"
ATTENTION, CONVOLUTION = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl")


@pytest.fixture(scope="module")
def parts(folder: Path) -> dict[str, Any]:
    return load_components(describe(folder))


@pytest.fixture(scope="module")
def pairs(parts: dict[str, Any]) -> Any:
    return lora_pairs(parts)


@pytest.fixture(scope="module")
def lora(folder: Path, pairs: Any) -> Path:
    return write_lora(folder.parent / "lora.safetensors", pairs, "peft")


def levels(pipe: Pipeline, **settings: Any) -> Any:
    return np.asarray(pipe(PROMPT, seed=1, **settings).images[0], dtype=np.int16)


def unet_with(folder: Path, *loras: Lora) -> Any:
    return load_components(describe(folder, Additions(loras=loras)))["unet"]


# --- names ---


def test_a_lora_draws_what_diffusers_draws_with_it(folder: Path, pairs: Any, tmp_path: Path) -> None:
    # Of the UNet only: diffusers 0.42 infers no type for a text encoder of which `mlp.fc1` alone is changed.
    of_unet = {key: value for key, value in pairs.items() if key[0] == "unet"}
    lora = write_lora(tmp_path / "unet.safetensors", of_unet, "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
        pipe.load_lora_weights(load_file(lora))
        pipe.fuse_lora(lora_scale=0.7)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(1)
        expected = np.asarray(
            pipe(PROMPT, num_inference_steps=1, guidance_scale=1.0, generator=generator).images[0], dtype=np.int16
        )
    found = levels(load(folder, lora={lora: 0.7}))
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - levels(load(folder))).max() > 3, "the LoRA must do something for this to mean anything"


def test_every_naming_is_the_same_lora_on_folder_and_file(folder: Path, pairs: Any, lora: Path, tmp_path: Path) -> None:
    scale = ALPHA / RANK
    kohya = write_lora(tmp_path / "kohya.safetensors", pairs, "kohya")
    path = single_file(folder, tmp_path / "model.safetensors", "sdxl", notes={"modelspec.resolution": "64x64"})
    expected = levels(load(folder, lora={lora: scale}))
    assert np.abs(levels(load(folder, lora=kohya)) - expected).max() <= 1
    assert np.abs(levels(load(path, lora=kohya)) - expected).max() <= 1
    twice = levels(load(folder, lora={lora: scale / 2, kohya: 0.5}))
    assert np.abs(twice - expected).max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_original_names_are_those_that_diffusers_converts(family: str) -> None:
    unet = tiny_unet(family)
    names = [name for name, one in unet.named_modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)]
    original = {f"{UNET_PREFIX}{original_name(name, unet)}.weight": name for name in names}
    # The converter asks for whole networks; what it gets here are names in place of tensors.
    rest = {f"{key.removesuffix('weight')}bias": value for key, value in original.items()}
    converted = convert_ldm_unet_checkpoint({**original, **rest}, dict(unet.config))
    assert {key.removesuffix(".weight"): name for key, name in converted.items() if key.endswith(".weight")} == {
        name: name for name in names
    }


@pytest.mark.parametrize(
    ("component", "layer", "name"),
    [
        ("unet", ATTENTION, f"base_model.model.{ATTENTION}"),
        ("unet", ATTENTION, f"unet.{ATTENTION.replace('.to_v', '.processor.to_v_lora')}"),
        ("unet", ATTENTION, "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v"),
        ("unet", CONVOLUTION, "lora_unet_middle_block_0_in_layers_2"),
        ("unet", "up_blocks.0.upsamplers.0.conv", "lora_unet_output_blocks_1_2_conv"),
        ("unet", "add_embedding.linear_1", "lora_unet_label_emb_0_0"),
        ("unet", "add_embedding.linear_1", "lora_unet_add_embedding_linear_1"),
        ("text_encoder", "encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder", "encoder.layers.0.self_attn.q_proj", "text_encoder.encoder.layers.0.self_attn.to_q_lora"),
        ("text_encoder_2", "encoder.layers.0.mlp.fc1", "text_encoders.clip_g.transformer.encoder.layers.0.mlp.fc1"),
    ],
)
def test_a_layer_is_found_by_the_name_that_a_trainer_gives_it(
    parts: dict[str, Any], component: str, layer: str, name: str
) -> None:
    found = find_layer(name, layers_by_name(parts))
    assert found is not None
    assert (found.component, found.name.removeprefix("text_model.")) == (component, layer)


def test_a_lora_by_the_original_files_names(folder: Path, pairs: Any, tmp_path: Path) -> None:
    (down, up) = pairs["unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors")
    theirs = unet_with(folder, Lora(tmp_path / "a.safetensors"))
    layer = theirs.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    plain = unet_with(folder).mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    torch.testing.assert_close(layer.weight, plain.weight + up @ down)


# --- kinds ---

KINDS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=2, init_lora_weights=False),
    "dora": peft.LoraConfig(r=3, lora_alpha=2, init_lora_weights=False, use_dora=True),
    "loha": peft.LoHaConfig(r=3, alpha=2, init_weights=False),
    "loha with a core": peft.LoHaConfig(r=3, alpha=2, init_weights=False, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=3, alpha=2, init_weights=False),
    "lokr of two products": peft.LoKrConfig(r=3, alpha=2, init_weights=False, decompose_both=True),
    "lokr with a core": peft.LoKrConfig(r=3, alpha=2, init_weights=False, use_effective_conv2d=True),
    "lokr of whole factors": peft.LoKrConfig(r=999, alpha=999, init_weights=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_adds_what_peft_adds(folder: Path, parts: dict[str, Any], kind: str, tmp_path: Path) -> None:
    config = deepcopy(KINDS[kind])
    config.target_modules = [ATTENTION, CONVOLUTION]
    torch.manual_seed(0)
    theirs = peft.PeftModel(deepcopy(parts["unet"]), config)
    if kind == "dora":
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.data *= torch.linspace(0.5, 2, parameter.numel()).reshape(parameter.shape)
    state = peft.get_peft_model_state_dict(theirs)
    alphas = {f"base_model.model.{name}.alpha": torch.tensor(2.0) for name in (ATTENTION, CONVOLUTION)}
    save_file({name: value.contiguous() for name, value in (state | alphas).items()}, tmp_path / "a.safetensors")
    expected = theirs.merge_and_unload().state_dict()
    found = unet_with(folder, Lora(tmp_path / "a.safetensors")).state_dict()
    changed = {name for name, value in parts["unet"].state_dict().items() if not torch.equal(value, found[name])}
    assert changed == {f"{ATTENTION}.weight", f"{CONVOLUTION}.weight"}
    for name in changed:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    half = unet_with(folder, Lora(tmp_path / "a.safetensors", 0.5)).state_dict()
    for name in changed:  # a scale is a mixture, of DoRA too
        middle = (parts["unet"].state_dict()[name] + found[name]) / 2
        torch.testing.assert_close(half[name], middle, rtol=1e-5, atol=1e-6)


def test_a_locon_with_a_core_is_its_three_convolutions(folder: Path, parts: dict[str, Any], tmp_path: Path) -> None:
    weight = parts["unet"].state_dict()[f"{CONVOLUTION}.weight"]
    rows, columns = weight.shape[:2]
    torch.manual_seed(0)
    down, mid, up = torch.randn(3, columns, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(rows, 3, 1, 1)
    name = f"lora_unet_{CONVOLUTION.replace('.', '_')}"
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    save_file({f"{name}.{end}": value for end, value in tensors.items()}, tmp_path / "a.safetensors")
    found = unet_with(folder, Lora(tmp_path / "a.safetensors")).state_dict()[f"{CONVOLUTION}.weight"]
    x = torch.randn(1, columns, 8, 8)
    convolve = torch.nn.functional.conv2d
    expected = convolve(x, weight, padding=1) + convolve(convolve(convolve(x, down), mid, padding=1), up)
    torch.testing.assert_close(convolve(x, found, padding=1), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_doras_magnitudes_are_the_lengths_of_rows_or_columns(folder: Path, axis: int, tmp_path: Path) -> None:
    weight = unet_with(folder).state_dict()[f"{ATTENTION}.weight"]
    torch.manual_seed(0)
    down, up = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
    lengths = torch.rand(weight.shape[axis]).unsqueeze(1 - axis) + 1
    name = f"lora_unet_{ATTENTION.replace('.', '_')}"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": lengths}
    save_file({f"{name}.{end}": value for end, value in tensors.items()}, tmp_path / "a.safetensors")
    found = unet_with(folder, Lora(tmp_path / "a.safetensors")).state_dict()[f"{ATTENTION}.weight"]
    torch.testing.assert_close(found.norm(dim=1 - axis, keepdim=True), lengths)
    direction = torch.nn.functional.normalize(weight + up @ down, dim=1 - axis)
    torch.testing.assert_close(torch.nn.functional.normalize(found, dim=1 - axis), direction)


def changed_by(folder: Path, file: Path, scale: float = 1.0) -> Any:
    return unet_with(folder, Lora(file, scale)).state_dict()[f"{ATTENTION}.weight"]


@pytest.mark.parametrize("where", ["header", "beside"])
def test_peft_says_alpha_beside_the_tensors(folder: Path, where: str, tmp_path: Path) -> None:
    weight = unet_with(folder).state_dict()[f"{ATTENTION}.weight"]
    torch.manual_seed(0)
    down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    file = tmp_path / "adapter_model.safetensors"

    def difference(**config: Any) -> Any:
        notes = {f"unet.{name}": value for name, value in config.items()}
        tensors = {f"unet.{ATTENTION}.lora_A.my_name.weight": down, f"unet.{ATTENTION}.lora_B.my_name.weight": up}
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(notes)} if where == "header" else None)
        if where == "beside":
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return changed_by(folder, file) - weight

    for config, scale in (
        ({}, 1.0),
        ({"r": 4, "lora_alpha": 16}, 4.0),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8.0),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"attn2.to_v": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"attn1.to_v": 2}}, 4.0),
    ):
        torch.testing.assert_close(difference(**config), up @ down * scale, rtol=1e-4, atol=1e-4)
    assert describe(folder, Additions(loras=[Lora(tmp_path)])).loras == (Lora(file),)


def test_whole_differences_and_biases_are_added(folder: Path, parts: dict[str, Any], tmp_path: Path) -> None:
    before = parts["unet"].state_dict()
    norm, bias = torch.randn(64), torch.randn(len(before[f"{ATTENTION}.weight"]))
    down, up = torch.randn(2, before[f"{ATTENTION}.weight"].shape[1]), torch.zeros(len(bias), 2)
    tensors = {
        "lora_unet_conv_norm_out.w_norm": norm,
        "lora_unet_conv_norm_out.b_norm": -norm,
        f"unet.{ATTENTION}.lora_A.weight": down,
        f"unet.{ATTENTION}.lora_B.weight": up,
        f"unet.{ATTENTION}.lora_B.bias": bias,
        f"unet.{ATTENTION}.alpha": torch.tensor([4.0]),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = unet_with(folder, Lora(tmp_path / "a.safetensors", 0.5)).state_dict()
    torch.testing.assert_close(found["conv_norm_out.weight"], before["conv_norm_out.weight"] + norm / 2)
    torch.testing.assert_close(found["conv_norm_out.bias"], before["conv_norm_out.bias"] - norm / 2)
    torch.testing.assert_close(found[f"{ATTENTION}.bias"], bias)  # alpha over rank is 2, which half of is 1
    save_file({**tensors, f"unet.{ATTENTION}.lora_A.other.weight": down.clone()}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="twice; save each of its adapters alone"):
        unet_with(folder, Lora(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"unet.{ATTENTION}.on_input", "IA3"),
        (f"unet.{ATTENTION}.oft_R.weight", "OFT"),
        (f"unet.{ATTENTION}.a1.weight", "GLoRA"),
        (f"unet.{ATTENTION}.lora_E", "AdaLoRA"),
        ("bundle_emb.word.clip_l", "an embedding that OneTrainer"),
        ("emb_params", "an embedding"),
        ("transformer.double_blocks.0.img_attn.lora_A.weight", "a LoRA for Flux"),
    ],
)
def test_other_kinds_are_named(folder: Path, key: str, kind: str, tmp_path: Path) -> None:
    down_and_up = {f"unet.{ATTENTION}.lora_A.weight": torch.zeros(1, 1), f"unet.{ATTENTION}.weight": torch.zeros(1)}
    save_file({**down_and_up, key: torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=rf"which no LoRA, LoHa, LoKr or DoRA has: it is {kind}"):
        unet_with(folder, Lora(tmp_path / "a.safetensors"))


# --- refusals ---


def test_a_lora_that_does_not_fit_is_one_sentence(folder: Path, pairs: Any, tmp_path: Path) -> None:
    strange = {("unet", f"{name}_of_another"): value for (_, name), value in pairs.items()}
    with pytest.raises(CheckpointError, match=rf"changes {len(strange)} layers .* another family"):
        load(folder, lora=write_lora(tmp_path / "strange.safetensors", strange, "peft"))
    wide = {key: (torch.zeros(RANK, 999), up) for key, (_, up) in list(pairs.items())[:1]}
    with pytest.raises(CheckpointError, match="another family"):
        load(folder, lora=write_lora(tmp_path / "wide.safetensors", wide, "peft"))
    turned = {("unet", ATTENTION.replace("attn2.to_v", "ff.net.2")): (torch.zeros(RANK, 128), torch.zeros(512, RANK))}
    with pytest.raises(CheckpointError, match="another family"):
        load(folder, lora=write_lora(tmp_path / "turned.safetensors", turned, "peft"))
    save_file({f"unet.{ATTENTION}.hada_w1_a": torch.zeros(64, 3)}, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"changes 'mid_block.*another family"):
        load(folder, lora=tmp_path / "half.safetensors")
    save_file({f"unet.{ATTENTION}.oft_blocks": torch.zeros(1)}, tmp_path / "oft.safetensors")
    with pytest.raises(CheckpointError, match=r"has 'unet.*oft_blocks', which no LoRA"):
        load(folder, lora=tmp_path / "oft.safetensors")
    (tmp_path / "lora.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsafeFormatError):
        load(folder, lora=tmp_path / "lora.pt")
    with pytest.raises(ModelNotFoundError, match="no LoRA"):
        load(folder, lora=tmp_path / "gone.safetensors")


def test_an_alpha_of_two_numbers_is_named(folder: Path, parts: dict[str, Any], pairs: Any, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "kohya.safetensors", pairs, "kohya")
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(".alpha"))
    save_file(weights | {name: torch.tensor([4.0, 4.0])}, file)
    with pytest.raises(CheckpointError, match=r"alpha' of 2 numbers, not of one"):
        unet_with(folder, Lora(file, 1.0))
