"""Pictures as uint8 [B, H, W, 3] and as float32 images [B, 3, H, W] in [-1, 1], in NumPy.

`onestill.networks.latents.to_uint8` does the same with tensors that stay on their device.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["to_images", "to_pictures"]


def to_pictures(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images [B, 3, H, W] in [-1, 1] -> pictures [B, H, W, 3]; values outside are clipped, rounding is diffusers'."""
    unit = np.clip(images.astype(np.float32, copy=False) * 0.5 + 0.5, 0.0, 1.0)
    return np.ascontiguousarray((unit * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


def to_images(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures [B, H, W, 3] -> images [B, 3, H, W] in [-1, 1]."""
    images = pictures.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    images /= 127.5  # in place, as batches of large pictures are converted in the thread that reads them
    images -= 1.0
    return images
