"""A whole model's networks on one device: what the torch engines call, in CUDA graphs or not. `[torch]`

Shapes: B batch, K tokens, D width of a token's state, P of a pooled one, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from onestill.checkpoint import ModelInfo
from onestill.networks.denoiser import call_unet
from onestill.networks.latents import LatentSpace
from onestill.networks.text_encoder import TextEncoder
from onestill.text.tokenize import PromptTokenizer

__all__ = ["Networks"]


class Networks:
    """A model's text encoder, UNet and latent space. Does not change after loading.

    Args:
        info: the model.
        parts: component -> module, on their device and in their types, as `load_components` gives them.
        tokenizers: one for each text encoder, for calls that take prompts.
    """

    def __init__(self, info: ModelInfo, parts: dict[str, Any], tokenizers: Sequence[PromptTokenizer] = ()) -> None:
        self.info, self.unet = info, parts["unet"]
        statistics = (info.latents_mean, info.latents_std)
        self.latent_space = LatentSpace(parts["vae"], parts.get("tiny_vae"), info.scaling_factor, statistics)
        towers = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
        self.text_encoder = TextEncoder(towers, tokenizers, use_attention_mask=info.use_attention_mask)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return torch.device(self.unet.device)

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        types: Iterator[torch.dtype] = (one.dtype for one in self.unet.parameters() if one.is_floating_point())
        return next(types)

    def output(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | float,
        states: torch.Tensor,
        pooled: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        guidance_scale: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """Latents [B, C, h, w] at one timestep -> the UNet's output, of the same shape.

        Of the networks' type, or float32 by `onestill.networks.precision`. `timestep` and `guidance_scale` may be
        tensors [] on the networks' device, so that a CUDA graph can be replayed with other values.
        """
        return call_unet(self.unet, x, timestep, states, pooled, time_ids, guidance_scale)
