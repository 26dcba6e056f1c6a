"""Tiny random models of the real architectures: Stable Diffusion 1.5 and 2.1 and SDXL, in folders and single files.

Real classes, the real vocabulary and the real key layouts; only widths and depths are small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from onestill.checkpoint.single_file import CLIP_PREFIXES, OPEN_CLIP_PREFIXES, UNET_PREFIX, VAE_PREFIX
from onestill.networks.libraries import quiet_libraries
from onestill.text.tokenize import clip_vocabulary
from tests.original_layout import place_of

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
TEXT = 64  # the width of a text encoder, and of one head
FAMILIES = ("sd15", "sd21", "sdxl")


def tiny_sd(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """Save a random model of a family into `folder`. `saving` goes to diffusers' `save_pretrained`."""
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(0)
        pipe = tiny_pipeline(family).to(dtype)
        pipe.save_pretrained(folder, safe_serialization=True, **saving)
    return folder


def tiny_pipeline(family: str) -> Any:
    common = {"unet": tiny_unet(family), "vae": tiny_vae(family), "tokenizer": tokenizer("<|endoftext|>")}
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            **common,
            text_encoder=text_encoder(CLIPTextModel, "quick_gelu"),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, "gelu"),
            tokenizer_2=tokenizer("!"),
            scheduler=EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        **common,
        text_encoder=text_encoder(CLIPTextModel, "quick_gelu" if family == "sd15" else "gelu"),
        scheduler=LCMScheduler(**BETAS)
        if family == "sd15"
        else EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenizer(pad: str) -> Any:
    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad)


def text_encoder(kind: Any, activation: str) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=TEXT,
        num_hidden_layers=3,
        num_attention_heads=1,
        intermediate_size=2 * TEXT,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=TEXT,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return kind(config)


def tiny_unet(family: str) -> Any:
    xl = family == "sdxl"
    options: dict[str, Any] = {}
    if xl:
        options = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": TEXT + 6 * 256,
        }
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if xl else ("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if xl else ("UpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 2) if xl else 1,
        layers_per_block=1,
        cross_attention_dim=2 * TEXT if xl else TEXT,
        attention_head_dim=8 if family == "sd15" else (1, 2),
        use_linear_projection=family != "sd15",
        **options,
    )
    with torch.no_grad():
        unet.conv_out.weight *= 4  # outputs near unit variance, so that pictures differ
        for name, parameter in unet.named_parameters():
            if "attn2.to_v" in name:
                parameter *= 8  # so that words matter
    return unet


def tiny_vae(family: str) -> Any:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        force_upcast=family == "sdxl",
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 4
    return vae


# --- single files ---------------------------------------------------------------------------------------------------


def single_file(folder: Path, path: Path, family: str, *, notes: dict[str, str] | None = None) -> Path:
    """Write a folder's weights as one file in the original key layout, as published checkpoints are."""
    found: dict[str, torch.Tensor] = {}
    vae = json.loads((folder / "vae" / "config.json").read_text())
    unet = json.loads((folder / "unet" / "config.json").read_text())
    found |= _renamed(folder / "unet", "unet", unet, UNET_PREFIX)
    found |= _renamed(folder / "vae", "vae", vae, VAE_PREFIX)
    if family == "sdxl":
        found |= _renamed(folder / "text_encoder", "clip", {}, CLIP_PREFIXES[0])
        found |= _renamed(folder / "text_encoder_2", "open_clip", {}, OPEN_CLIP_PREFIXES[0])
    elif family == "sd15":
        found |= _renamed(folder / "text_encoder", "clip", {}, CLIP_PREFIXES[1])
    else:
        found |= _renamed(folder / "text_encoder", "open_clip", {}, OPEN_CLIP_PREFIXES[1])
        # The original has one layer more than the model listens to, and a projection that nothing uses.
        last = {name: value for name, value in found.items() if ".resblocks.2." in name}
        found |= {name.replace(".resblocks.2.", ".resblocks.3."): value.clone() for name, value in last.items()}
        found[f"{OPEN_CLIP_PREFIXES[1]}text_projection"] = torch.zeros(TEXT, TEXT)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in found.items()}, path, metadata=notes)
    return path


def _renamed(folder: Path, layout: str, config: dict[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    place = place_of(layout, config, state)
    found: dict[str, torch.Tensor] = {}
    thirds: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in state.items():
        at = place(name)
        if at is None:
            continue
        value = value.T if at.transposed else value
        if layout == "vae" and "attn_1" in at.name and "norm" not in at.name and at.name.endswith("weight"):
            value = value[:, :, None, None]
        if at.third is None:
            found[prefix + at.name] = value
        else:
            thirds.setdefault(prefix + at.name, {})[at.third] = value
    return found | {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}
