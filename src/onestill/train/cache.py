"""Latents and text states computed once: what the teacher and the student train on, instead of pictures and words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from onestill.train.batches import collate_images
from onestill.train.conditioning import LatentSpace, TextEncoder


class ImageSample(Protocol):
    image: NDArray[np.uint8]
    caption: str


Write = Callable[[Any, Mapping[str, NDArray[Any]]], None]


@torch.no_grad()
def cache_samples(
    samples: Iterable[ImageSample], space: LatentSpace, encoder: TextEncoder, write: Write, batch_size: int = 64
) -> int:
    """Hand each sample to `write` with its arrays; returns how many there were.

    The arrays: `latents` float16 [C, h, w] of unit variance, `text` float16 [K, D], `mask` bool [K].
    """
    count = 0
    device = next(space.autoencoder.parameters()).device
    for chunk in _chunks(samples, batch_size):
        batch = collate_images(chunk)
        images = batch["images"].to(device, memory_format=torch.channels_last)
        latents = space.encode(images).contiguous().cpu()
        text, mask = encoder(batch["captions"])
        for sample, z, states, real in zip(
            chunk, latents.half().numpy(), text.half().cpu().numpy(), mask.cpu().numpy(), strict=True
        ):
            write(sample, {"latents": z, "text": states, "mask": real})
        count += len(chunk)
    return count


def _chunks(samples: Iterable[ImageSample], size: int) -> Iterator[Sequence[ImageSample]]:
    iterator = iter(samples)
    while chunk := list(islice(iterator, size)):
        yield chunk
