"""Latents of unit variance: the autoencoder that makes them, and the decoder that turns them into images. `[torch]`

Shapes: B batch, H W pixels, C latent channels, h w latent size.
"""

from __future__ import annotations

import copy
import json
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor, nn

from onestill.errors import CheckpointError
from onestill.networks.libraries import open_whole

__all__ = ["LatentSpace", "load_autoencoder", "most_likely_latents", "to_uint8"]

OVERFLOW = "The autoencoder overflowed {}; the image was decoded in float32. Load the model in bfloat16 to avoid this."
DECODED_TOGETHER = 4  # images to a call of `LatentSpace.pictures`, which bounds memory


class LatentSpace:
    """An autoencoder seen from the side of unit-variance latents, which are what a denoiser works on.

    Args:
        autoencoder: an AutoencoderTiny or AutoencoderKL of diffusers. It encodes.
        decoder: another autoencoder of the same latents that decodes in its place, such as TAESD. Its own scaling
            factor says what it takes, as it does in a diffusers pipeline whose VAE is replaced.
        scale: what the autoencoder's latents are multiplied by; None reads its config.
        statistics: the mean and the standard deviation of each of its C channels, which are taken out before; None
            reads its config, and empty ones are 0 and 1.

    Raises:
        CheckpointError: the decoder takes latents with another number of channels.
    """

    def __init__(
        self,
        autoencoder: Any,
        decoder: Any = None,
        scale: float | None = None,
        statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.autoencoder = autoencoder
        self.decoder = autoencoder if decoder is None else decoder
        own, self.shift = _scale_and_shift(autoencoder.config)
        self.scale = own if scale is None else scale
        config = autoencoder.config
        mean, std = statistics or (config.get("latents_mean") or (), config.get("latents_std") or ())
        self._statistics = torch.tensor([mean, std]).view(2, 1, -1, 1, 1) if mean and std else None
        self.channels = int(autoencoder.config.latent_channels)
        taken = int(self.decoder.config.latent_channels)
        if taken != self.channels:
            raise CheckpointError(
                f"The decoder takes latents of {taken} channels and the autoencoder makes {self.channels}: it decodes "
                "other latents; give the tiny VAE made for this model."
            )
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: str | Path, decoder: str | Path = "") -> LatentSpace:
        """The autoencoder in a folder in diffusers' format, frozen; `decoder` is the folder of another one, or ""."""
        return cls(load_autoencoder(folder), load_autoencoder(decoder) if decoder else None)

    @property
    def factor(self) -> int:
        """Pixels for each latent along a side."""
        config = self.autoencoder.config
        return int(2 ** (len(config.get("block_out_channels") or config.get("encoder_block_out_channels")) - 1))

    @torch.no_grad()
    def calibrate(self, images: Tensor, folder: str | Path) -> float:
        """Set the scale that gives the latents of `images` [B, 3, H, W] unit variance, here and in the folder."""
        raw = most_likely_latents(self.autoencoder, images)
        # About each channel's own mean: a constant offset costs a denoiser nothing, and noise has none.
        self.scale = round(float((raw - raw.mean((0, 2, 3), keepdim=True)).std().reciprocal()), 4)
        self.autoencoder.register_to_config(scaling_factor=self.scale)
        self.autoencoder.save_config(folder)
        return self.scale

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LatentSpace:
        """Move the weights, and convert them to `dtype` where one is given."""
        for network in (self.autoencoder, self.decoder):
            # diffusers' own `to` warns of modules to keep in float32 even where there are none.
            nn.Module.to(network, device=device, dtype=dtype)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] float32 of about unit variance."""
        raw = most_likely_latents(self.autoencoder, images.to(next(self.autoencoder.parameters()).dtype))
        if self._statistics is not None:
            mean, std = self._statistics_on(raw.device)
            normal: Tensor = (raw.float() - mean) * self.scale / std
            return normal
        return (raw.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W] float32 in about [-1, 1]; gradients flow through."""
        return self._decode(self.decoder, latents)

    def checked_decode(self, latents: Tensor) -> Tensor:
        """As `decode`, but a half-precision overflow is decoded again in float32 and gives a warning.

        Raises:
            FloatingPointError: the latents are not finite, or the image is not even in float32.
        """
        if not torch.isfinite(latents).all():
            raise FloatingPointError("the latents")
        images = self.decode(latents)
        if torch.isfinite(images).all():
            return images
        dtype = next(self.decoder.parameters()).dtype
        if dtype != torch.float32:
            warnings.warn(OVERFLOW.format(str(dtype).removeprefix("torch.")), RuntimeWarning, stacklevel=2)
            with self._lock:  # one float32 copy at a time, as they take twice the memory
                images = self._decode(copy.deepcopy(self.decoder).float(), latents.float())
        if not torch.isfinite(images).all():
            raise FloatingPointError("the picture")
        return images

    def _decode(self, decoder: Any, latents: Tensor) -> Tensor:
        replaced = self.decoder is not self.autoencoder
        scale, shift = _scale_and_shift(self.decoder.config) if replaced else (self.scale, self.shift)
        if self._statistics is not None and not replaced:
            mean, std = self._statistics_on(latents.device)
            raw = latents * std / scale + mean
        else:
            raw = latents / scale + shift
        raw = raw.to(next(decoder.parameters()).dtype)
        images: Tensor = decoder.decode(raw, return_dict=False)[0]
        return images.float()

    def _statistics_on(self, device: torch.device) -> Tensor:
        """Mean and standard deviation [2, 1, C, 1, 1]; moved once, as a CUDA graph allows no copy from the host."""
        assert self._statistics is not None
        if self._statistics.device != device:
            self._statistics = self._statistics.to(device)
        return self._statistics

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures uint8 [B, H, W, 3]."""
        some = torch.split(latents, DECODED_TOGETHER)
        return np.concatenate([to_uint8(self.decode(part)).cpu().numpy() for part in some])


def load_autoencoder(folder: str | Path) -> nn.Module:
    """An AutoencoderTiny or AutoencoderKL from its folder in diffusers' format; frozen.

    Raises:
        CheckpointError: the folder holds no such network.
    """
    try:
        name = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["_class_name"]
        kind = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}[name]
        model: nn.Module = open_whole(kind, folder)
    except Exception as error:  # of files that are damaged the libraries raise anything
        raise CheckpointError(
            f"{folder} holds no AutoencoderTiny or AutoencoderKL: train one with an 'autoencoder' recipe."
        ) from error
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def most_likely_latents(autoencoder: Any, images: Tensor) -> Tensor:
    """An autoencoder's latents for images [B, 3, H, W]: the mode, where it gives a distribution. Not scaled."""
    encoded = autoencoder.encode(images)
    latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents


def to_uint8(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> pictures uint8 [B, H, W, 3], rounded as `onestill.pixels.to_pictures` does."""
    unit = (images.float() * 0.5 + 0.5).clamp(0.0, 1.0)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _scale_and_shift(config: Any) -> tuple[float, float]:
    # Not every config that AutoencoderKL reads has a shift, and some say null.
    return float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
