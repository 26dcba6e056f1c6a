"""Pictures of any kind -> RGB, and what damaged ones raise."""

from __future__ import annotations

import io
import struct
import tokenize

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

# What Pillow, JSON and NumPy raise on damaged bytes, by format.
DAMAGE = (
    ValueError,
    SyntaxError,
    OSError,
    EOFError,
    RecursionError,
    struct.error,
    tokenize.TokenError,
    Image.DecompressionBombError,
)


def on_white(image: Image.Image) -> Image.Image:
    """An image as RGB, transparent parts on white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # which Pillow cuts off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """An encoded picture as uint8 [H, W, 3], transparent parts on white.

    Raises ValueError, SyntaxError or OSError if it is damaged.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError("its image is of no known kind") from error
    return np.array(on_white(image), dtype=np.uint8)
