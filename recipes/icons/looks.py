"""What an icon looks like: its main colours, and a fingerprint by which near-copies are found."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from onestill.evaluate.colour import PALETTE
from recipes.icons.drawing import Pixels, rasterise
from recipes.icons.table import Icon

Floats = npt.NDArray[np.floating]

_SRGB_TO_XYZ = np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
_SIDE = 64
# Two pictures are near-copies when their 256 hash bits and their 8 x 8 thumbnails (0 to 255) are this close.
_MOST_BITS = 16
_MOST_GREY = {True: 5.0, False: 9.0}
_DCT = np.array([[np.cos(np.pi * (2 * x + 1) * u / 64) for x in range(32)] for u in range(16)])


def _lab(rgb: npt.ArrayLike) -> Floats:
    c = np.asarray(rgb, np.float64) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    x = c @ _SRGB_TO_XYZ / np.array([0.9505, 1, 1.089])
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


_NAMES = list(PALETTE)
_NAMED = _lab(list(PALETTE.values()))


def main_colours(pixels: Pixels) -> list[str]:
    """The names of at most three colours that each cover more than 12 % of what is drawn, the largest first."""
    drawn = pixels[..., 3] > 200
    if drawn.sum() < 20:
        return []
    distance = ((_lab(pixels[drawn][:, :3][::3])[:, None] - _NAMED) ** 2).sum(-1)
    counts = np.bincount(distance.argmin(1), minlength=len(_NAMES))
    shares = counts / counts.sum()
    return [_NAMES[i] for i in np.argsort(-shares) if shares[i] > 0.12][:3]


@dataclass(frozen=True)
class Looks:
    """`bits`: bool [256]; `thumbnail`: float32 [192], 8 x 8 RGB on white."""

    bits: npt.NDArray[np.bool_]
    thumbnail: npt.NDArray[np.float32]
    colours: list[str]


def _hash(grey: Floats) -> npt.NDArray[np.bool_]:
    """The signs of the 16 x 16 lowest DCT frequencies of a 64 x 64 picture about their median."""
    low = (_DCT @ grey.reshape(32, 2, 32, 2).mean((1, 3)) @ _DCT.T).ravel()
    low[0] = np.median(low[1:])
    found: npt.NDArray[np.bool_] = low > np.median(low)
    return found


def looks_of(icon: Icon) -> Looks | None:
    """The looks of an icon; None if it is blank or cannot be drawn."""
    try:
        if icon.img is not None:
            picture = Image.open(io.BytesIO(icon.img)).convert("RGBA").resize((_SIDE, _SIDE), Image.Resampling.BOX)
            pixels = np.asarray(picture)
        else:
            pixels = rasterise(icon.svg or "", _SIDE)
    except (ValueError, OSError):
        return None
    alpha = pixels[..., 3].astype(np.float32) / 255
    if alpha.mean() < 0.01:
        return None
    if icon.palette:
        flat = pixels[..., :3] * alpha[..., None] + 255 * (1 - alpha[..., None])
        grey = flat @ np.array([0.3, 0.59, 0.11])
    else:
        grey = 255 * (1 - alpha)
        flat = np.repeat(grey[..., None], 3, -1)
    thumbnail = flat.reshape(8, 8, 8, 8, 3).mean((1, 3)).ravel().astype(np.float32)
    return Looks(_hash(grey), thumbnail, main_colours(pixels) if icon.palette else [])


def near_copies(icons: Sequence[Icon], looks: Sequence[Looks], block: int = 2000) -> list[int]:
    """For each icon the index of the earlier one that it nearly copies, or -1. Emoji of other meaning are no copies."""
    copies = [-1] * len(icons)
    signs = np.array([look.bits for look in looks], np.float32) * 2 - 1
    thumbnails = np.array([look.thumbnail for look in looks])
    for palette in (True, False):
        members = np.flatnonzero([icon.palette is palette for icon in icons])
        part = signs[members]
        for start in range(0, len(members), block):
            distance = (256 - part[start : start + block] @ part.T) / 2
            for later, earlier in zip(*np.where(distance <= _MOST_BITS), strict=True):
                later += start
                if earlier >= later:
                    continue
                x, y = members[later], members[earlier]
                if copies[x] != -1 or copies[y] != -1:
                    continue
                if np.abs(thumbnails[x] - thumbnails[y]).mean() >= _MOST_GREY[palette]:
                    continue
                # Flags and clock faces look alike and are not the same thing.
                if palette and icons[x].source == "emoji" and icons[x].hex != icons[y].hex:
                    continue
                copies[x] = int(y)
    return copies
