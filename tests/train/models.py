"""Whole models of the real families at tiny width, in diffusers' format: SD 1.5, SD 2.1 (v) and SDXL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from onestill.networks.libraries import quiet_libraries

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-!?'"
SIDE, TOKENS = 4, 16  # latents, and what prompts are padded to
PREDICTION = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}


def write_model(folder: Path, family: str) -> Path:
    """A random model of `family` ("sd15", "sd21" or "sdxl") that diffusers opens; its pictures are 32 px."""
    torch.manual_seed(0)
    with quiet_libraries():
        tokenizer = _tokenizer(folder.parent / f"{folder.name}-words")
        parts: dict[str, Any] = {"vae": _vae(), "tokenizer": tokenizer, "unet": _unet(family)}
        parts["text_encoder"] = CLIPTextModel(_text(tokenizer, 16))
        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
        if family == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(_text(tokenizer, 24))
            parts |= {"tokenizer_2": tokenizer, "scheduler": EulerDiscreteScheduler(**schedule)}
            StableDiffusionXLPipeline(**parts).save_pretrained(folder)
        else:
            scheduler = DDIMScheduler(**schedule, prediction_type=PREDICTION[family], clip_sample=False)
            checks = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            StableDiffusionPipeline(**parts, **checks, scheduler=scheduler).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n")
    return folder


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters, alone or at the end of a word; no pairs are merged."""
    folder.mkdir(parents=True)
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def _text(tokenizer: Any, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=20,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=32, force_upcast=False,
        scaling_factor=0.13025,
    )  # fmt: skip


def _unet(family: str) -> UNet2DConditionModel:
    shape: dict[str, Any] = {
        "sample_size": SIDE, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "attention_head_dim": (2, 4), "cross_attention_dim": 16, "use_linear_projection": family != "sd15",
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    if family == "sdxl":
        shape |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2), "cross_attention_dim": 16 + 24,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        }  # fmt: skip
    return UNet2DConditionModel(**shape)
