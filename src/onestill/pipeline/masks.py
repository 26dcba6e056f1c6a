"""Masks for inpainting: which part of a picture is drawn, in pixels and in latents.

A mask with an alpha channel is OpenAI's: where it is transparent, the picture is drawn. Any other is diffusers': where
it is white. In between, what is drawn and the picture are mixed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.Image import Image

from onestill.errors import ImageError
from onestill.pipeline.picture import as_upright, cut_to, on_white

__all__ = ["MaskSizeError", "Start", "fitted_mask"]


class MaskSizeError(ImageError):
    """A mask has another size than its image."""


class Start(NamedTuple):
    """What image to image starts from.

    Attributes:
        picture: uint8 [H, W, 3].
        weights: uint8 [H, W], 255 where it is drawn and 0 where it stays; None draws everywhere.
        latents: [1, C, h, w], the picture's.
    """

    picture: NDArray[np.uint8]
    weights: NDArray[np.uint8] | None
    latents: NDArray[np.float32]

    @property
    def latent_mask(self) -> NDArray[np.float32] | None:
        """[1, 1, h, w]: 1 for each latent with a pixel that is drawn at least by half, else 0; None without a mask."""
        if self.weights is None:
            return None
        height, width = self.latents.shape[2:]
        cells = self.weights.reshape(height, self.weights.shape[0] // height, width, -1)
        latent_mask: NDArray[np.float32] = (cells.max(axis=(1, 3)) >= 128).astype(np.float32)
        return latent_mask[None, None]

    def composite(self, drawn: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What was drawn [B, H, W, 3], with the picture's own pixels outside the mask."""
        if self.weights is None:
            return drawn
        share = self.weights[..., None].astype(np.float32) / 255
        return (self.picture + share * (drawn.astype(np.float32) - self.picture)).round().astype(np.uint8)


def fitted_mask(
    mask: Image | NDArray[np.uint8], image: Image | NDArray[np.uint8], height: int, width: int
) -> NDArray[np.uint8]:
    """A mask as weights uint8 [height, width], 255 where the picture is drawn, cut as `fitted` cuts the picture.

    Args:
        mask: PIL or uint8 [H, W], [H, W, 3] or [H, W, 4].
        image: the picture that it belongs to.
        height: pixels.
        width: pixels.

    Raises:
        ImageError: it cannot be used, or its size is not the image's.
    """
    try:
        found, size = as_upright(mask), as_upright(image).size
        if found.has_transparency_data:
            weights = PIL.Image.fromarray(255 - np.asarray(found.convert("RGBA").getchannel("A")))
        else:
            weights = on_white(found).convert("L")
    except MemoryError:
        raise
    except Exception as error:  # Pillow decodes only now, and raises anything on damaged bytes
        raise ImageError(f"The mask cannot be used ({error}); give a PIL image or uint8 [H, W].") from error
    if weights.size != size:
        shown = " and the image ".join(f"{width}x{height}" for width, height in (weights.size, size))
        raise MaskSizeError(f"The mask has {shown} pixels; give both the same size.")
    return np.asarray(cut_to(weights, height, width), dtype=np.uint8)
