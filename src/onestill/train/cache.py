"""Latents and text states computed once: what teachers and students train on, instead of pictures and captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from onestill.engine.device import choose
from onestill.networks.latents import LatentSpace
from onestill.networks.libraries import quiet_libraries
from onestill.networks.text_encoder import TextEncoder, open_text_encoder
from onestill.train.batches import collate_images


class ImageSample(Protocol):
    @property
    def image(self) -> NDArray[np.uint8]: ...

    @property
    def caption(self) -> str: ...


Write = Callable[[Any, Mapping[str, NDArray[Any]]], None]


@torch.no_grad()
def cache_samples(
    samples: Iterable[ImageSample],
    space: LatentSpace,
    encoder: TextEncoder,
    write: Write,
    batch_size: int = 64,
) -> int:
    """Hand each sample to `write` with its arrays; returns how many there were.

    The arrays: `latents` float16 [C, h, w] of unit variance, `text` float16 [K, D], `mask` bool [K]; for a model of
    two text encoders `pooled` float16 [P] and `sizes` int32 [6] too, the latter from the sample's `original_size` and
    `crop` (height and width, top and left, in pixels) where its JSON tells them.
    """
    count = 0
    device = next(space.autoencoder.parameters()).device
    remaining = iter(samples)
    while chunk := list(islice(remaining, batch_size)):
        batch = collate_images(chunk)
        images = batch["images"].to(device, memory_format=torch.channels_last)
        conditioning = encoder(batch["captions"])
        arrays = {"latents": space.encode(images).half(), "text": conditioning.text.half(), "mask": conditioning.mask}
        if conditioning.pooled is not None:
            arrays["pooled"] = conditioning.pooled.half()
        stacked = {name: value.contiguous().cpu().numpy() for name, value in arrays.items()}
        for i, sample in enumerate(chunk):
            mine = {name: value[i] for name, value in stacked.items()}
            write(sample, mine | ({"sizes": _sizes(sample)} if conditioning.pooled is not None else {}))
        count += len(chunk)
    return count


def cache_for_model(
    samples: Iterable[ImageSample], model: Path, write: Write, *, device: str | None = "cpu", batch_size: int = 8
) -> int:
    """`cache_samples` by the autoencoder and the text encoders of a whole model in diffusers' format.

    Raises:
        OnestillError: the device is not there. CheckpointError: a part of the model is not.
    """
    where = torch.device(choose(device))
    with quiet_libraries():
        space, encoder = LatentSpace.load(model / "vae").to(where), open_text_encoder(str(model)).to(where)
    return cache_samples(samples, space, encoder, write, batch_size)


def _sizes(sample: Any) -> NDArray[np.int32]:
    """SDXL's micro-conditioning: original height and width, crop's top and left, height and width as they are."""
    now = list(sample.image.shape[:2])
    meta: Mapping[str, Any] = getattr(sample, "meta", {})
    return np.array([*_pair(meta.get("original_size"), now), *_pair(meta.get("crop"), [0, 0]), *now], np.int32)


def _pair(found: Any, default: list[int]) -> list[int]:
    """Two whole numbers from a sample's JSON, which others wrote; the default where it says something else."""
    is_pair = isinstance(found, list) and len(found) == 2 and all(type(one) is int for one in found)
    return found if is_pair else default
