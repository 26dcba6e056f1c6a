"""A model's networks as functions of tensors on one device: what every torch engine calls, graphed or not. `[torch]`.

Shapes: B batch, K tokens, D width of a token's state, P of a pooled one, C latent channels, h w latent size.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from onestill.checkpoint import ModelInfo

__all__ = ["Networks", "most_likely_latents"]

OVERFLOW = "The autoencoder's numbers left the range of {}; the picture was decoded in float32. bfloat16 avoids this."


class Networks:
    """Words to states, latents to a network's output, latents to pictures and back. Does not change after loading.

    Args:
        info: the model.
        parts: component -> module, on their device and in their types, as `load_components` gives them.
    """

    def __init__(self, info: ModelInfo, parts: dict[str, Any]) -> None:
        self.info = info
        self.unet, self.vae = parts["unet"], parts["vae"]
        self.decoder = parts.get("tiny_vae", self.vae)
        self.text_encoders = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
        tiny = "tiny_vae" in parts
        self.decoder_scale = float(self.decoder.config.scaling_factor) if tiny else info.scaling_factor
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return torch.device(self.unet.device)

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        types: Iterator[torch.dtype] = (one.dtype for one in self.unet.parameters() if one.is_floating_point())
        return next(types)

    def states(
        self, ids: Sequence[torch.Tensor], mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token numbers, [B, K] for each text encoder -> states [B, K, D], and pooled [B, P] where the model has it."""
        if not self.info.is_xl:
            return self.text_encoders[0](ids[0], attention_mask=mask)[0], None
        found = [
            encoder(numbers, output_hidden_states=True)
            for encoder, numbers in zip(self.text_encoders, ids, strict=True)
        ]
        # SDXL listens to both encoders' last layer but one, side by side, and to the second's sentence as a whole.
        return torch.cat([one.hidden_states[-2] for one in found], dim=-1), found[-1].text_embeds

    def output(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | int,
        states: torch.Tensor,
        pooled: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        guidance_scale: torch.Tensor | float = 1.0,
    ) -> torch.Tensor:
        """Latents [B, C, h, w] at one timestep -> the UNet's output, of the same shape.

        Of the networks' type, or float32 by `onestill.networks.precision`. `timestep` and `guidance_scale` may be
        tensors [] on the networks' device, so that a CUDA graph can be given others.
        """
        options: dict[str, Any] = {}
        if self.info.is_xl:
            options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
        if width := self.unet.config.time_cond_proj_dim:
            options["timestep_cond"] = _guidance_embedding(guidance_scale - 1.0, width, x).expand(len(x), -1)
        found: torch.Tensor = self.unet(x, timestep, states, return_dict=False, **options)[0]
        return found

    def image(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W] in [-1, 1], not clipped, not checked."""
        z = (latents / self.decoder_scale).to(self.decoder.dtype)
        found: torch.Tensor = self.decoder.decode(z, return_dict=False)[0]
        return found

    def checked_image(self, latents: torch.Tensor) -> torch.Tensor:
        """As `image`, but decoded again in float32 where half precision overflowed, which a warning says.

        Raises:
            FloatingPointError: the latents are no numbers, or decode to none even in float32.
        """
        if not torch.isfinite(latents).all():
            raise FloatingPointError("the latents")
        found = self.image(latents)
        if torch.isfinite(found).all():
            return found
        if self.decoder.dtype != torch.float32:
            warnings.warn(OVERFLOW.format(str(self.decoder.dtype).removeprefix("torch.")), RuntimeWarning, stacklevel=2)
            with self._lock:  # one wider copy at a time, as memory is what a wider type is short of
                found = self._image_in_float32(latents)
        if not torch.isfinite(found).all():
            raise FloatingPointError("the picture")
        return found

    def _image_in_float32(self, latents: torch.Tensor) -> torch.Tensor:
        twin = copy.deepcopy(self.decoder).float()
        found: torch.Tensor = twin.decode(latents.float() / self.decoder_scale, return_dict=False)[0]
        return found

    def latents(self, image: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> their most likely latents [B, C, h, w], as the UNet sees them."""
        return most_likely_latents(self.vae, image.to(self.vae.dtype)) * self.info.scaling_factor


def most_likely_latents(vae: Any, image: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents for images [B, 3, H, W]: the mode, where it gives a distribution."""
    encoded = vae.encode(image)
    latents: torch.Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents


def to_uint8(image: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> pictures [B, H, W, 3], rounded as diffusers rounds."""
    unit = (image.float() * 0.5 + 0.5).clamp(0.0, 1.0)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _guidance_embedding(weight: torch.Tensor | float, width: int, like: torch.Tensor) -> torch.Tensor:
    """[1, width], sines then cosines of 1000 times the guidance weight (Luo et al. 2023)."""
    half = width // 2
    rows = torch.arange(half, dtype=torch.float32, device=like.device)  # there, as a graph allows no copy
    angles = 1000.0 * weight * torch.exp(rows * (-math.log(10000.0) / (half - 1)))
    return torch.cat([angles.sin(), angles.cos()])[None].to(like.dtype)
