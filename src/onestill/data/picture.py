"""Encoded pictures -> pixels, and what damaged ones raise."""

from __future__ import annotations

import io
import struct
import tokenize

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from onestill.pipeline.picture import on_white

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


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """An encoded picture as uint8 [H, W, 3], transparent parts on white.

    Raises ValueError, SyntaxError or OSError if it is damaged.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError("its image is of no known kind") from error
    return np.array(on_white(image), dtype=np.uint8)
