"""Encoded pictures -> pixels, and what damaged samples raise."""

from __future__ import annotations

import struct
import tokenize

import numpy as np
import numpy.typing as npt

from onestill.pipeline.picture import read_picture

# What JSON and NumPy raise on damaged bytes, and reading a file or a picture, of which an ImageError is a ValueError.
DAMAGE = (ValueError, SyntaxError, OSError, EOFError, RecursionError, struct.error, tokenize.TokenError)


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """An encoded picture as uint8 [H, W, 3], upright, transparent parts on white.

    Raises ImageError if it is damaged.
    """
    return np.array(read_picture(data), dtype=np.uint8)
