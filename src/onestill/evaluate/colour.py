"""Which named colour a picture shows, judged by its pixels alone, and the colour test built on it.

Shapes: H W pixels, B pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestill.errors import ImageError

Float = NDArray[np.float64]

PALETTE: dict[str, tuple[int, int, int]] = {
    "black": (20, 20, 22),
    "dark gray": (75, 75, 80),
    "gray": (140, 142, 148),
    "light gray": (200, 202, 206),
    "white": (250, 250, 250),
    "red": (218, 40, 45),
    "dark red": (140, 25, 35),
    "orange": (245, 135, 30),
    "yellow": (252, 205, 45),
    "gold": (205, 150, 35),
    "cream": (250, 230, 190),
    "brown": (120, 72, 45),
    "tan": (205, 160, 115),
    "green": (55, 165, 70),
    "dark green": (25, 95, 50),
    "lime": (160, 215, 50),
    "teal": (20, 150, 145),
    "cyan": (60, 205, 225),
    "light blue": (140, 195, 250),
    "blue": (45, 110, 225),
    "navy": (30, 45, 110),
    "purple": (125, 65, 185),
    "lavender": (190, 165, 240),
    "magenta": (215, 45, 150),
    "pink": (250, 160, 190),
}
# A shade counts for the family that a person would name: the shadow side of a red ball is dark red, and still red.
FAMILIES: dict[str, str] = {
    "dark gray": "gray",
    "light gray": "gray",
    "dark red": "red",
    "gold": "yellow",
    "dark green": "green",
    "lime": "green",
    "light blue": "blue",
    "navy": "blue",
    "lavender": "purple",
}
_LEVELS = 32  # colours are named after rounding each channel to 32 levels: 4/255 off at most
_BACKGROUND_DELTA_E = 10.0
_WHITE_LIGHTNESS, _WHITE_CHROMA = 92.0, 8.0
_LEAST_FOREGROUND = 0.01


def _lab(rgb: NDArray[Any]) -> Float:
    """Convert sRGB [..., 3] in 0..255 to CIELAB (D65) [..., 3]."""
    c = np.asarray(rgb, np.float64) / 255
    linear = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    to_xyz = np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz = linear @ to_xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


@cache
def _tables() -> tuple[Float, NDArray[np.intp]]:
    """CIELAB and the nearest palette entry of each of the 32^3 rounded colours, flat."""
    level = (np.arange(_LEVELS) + 0.5) * 256 / _LEVELS - 0.5
    grid = np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _lab(grid)
    palette = _lab(np.array(list(PALETTE.values())))
    nearest = ((lab[:, None] - palette[None]) ** 2).sum(axis=-1).argmin(axis=1)
    return lab, nearest


def _codes(picture: NDArray[np.uint8]) -> NDArray[np.intp]:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ImageError(f"a picture is uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}; convert it to RGB")
    rounded = picture.astype(np.intp) * _LEVELS // 256
    return np.asarray((rounded[..., 0] * _LEVELS + rounded[..., 1]) * _LEVELS + rounded[..., 2], np.intp)


def foreground(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pixels [H, W] of a picture are not background.

    Background is every near-white pixel (CIELAB L* >= 92 and chroma <= 8) and, where at least half of the border ring
    (the outermost 1/32 of the picture) lies within CIE76 Delta-E 10 of the ring's median colour, every pixel that near
    to it. A drawing that fills the picture to its border has the border's colour as its own: when the second rule
    leaves less than 1 % of the pixels, only the first one holds.
    """
    codes = _codes(picture)
    lab = _tables()[0][codes]  # [H, W, 3]
    coloured = (lab[..., 0] < _WHITE_LIGHTNESS) | (np.hypot(lab[..., 1], lab[..., 2]) > _WHITE_CHROMA)
    width = max(1, min(picture.shape[:2]) // 32)
    ring = np.ones(codes.shape, bool)
    ring[width:-width, width:-width] = False
    border = np.median(lab[ring], axis=0)
    near_border = ((lab - border) ** 2).sum(axis=-1) <= _BACKGROUND_DELTA_E**2
    if near_border[ring].mean() < 0.5:
        return coloured
    inner = coloured & ~near_border
    return inner if inner.mean() >= _LEAST_FOREGROUND else coloured


def named_colour(picture: NDArray[np.uint8]) -> str | None:
    """The colour family that most foreground pixels belong to, e.g. "red"; None for an empty picture.

    Each pixel of `foreground` goes to the nearest colour of PALETTE in CIELAB, then to its family in FAMILIES.

    Args:
        picture: uint8 [H, W, 3].
    """
    mask = foreground(picture)
    if mask.mean() < _LEAST_FOREGROUND:
        return None
    counts = np.bincount(_tables()[1][_codes(picture)[mask]], minlength=len(PALETTE))
    shares: dict[str, int] = {}
    for name, count in zip(PALETTE, counts, strict=True):
        family = FAMILIES.get(name, name)
        shares[family] = shares.get(family, 0) + int(count)
    return max(shares, key=shares.__getitem__)


@dataclass(frozen=True)
class ColourTest:
    """The prompts of a colour test: every colour with every shape.

    `template` names both, e.g. "a {colour} {shape}".
    """

    colours: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple")
    shapes: tuple[str, ...] = ("heart", "star", "circle", "square", "triangle")
    template: str = "a {colour} {shape}"


@dataclass(frozen=True)
class ColourVerdict:
    """One picture of the colour test: what was asked, and the family seen (None: an empty picture)."""

    prompt: str
    seed: int
    asked: str
    seen: str | None

    @property
    def hit(self) -> bool:
        """Whether the asked colour dominates."""
        return self.asked == self.seen


def colour_prompts(test: ColourTest | None = None) -> list[tuple[str, str]]:
    """(prompt, colour asked for), colour by colour: 25 pairs for the default test."""
    test = test or ColourTest()
    return [(test.template.format(colour=c, shape=s), c) for c in test.colours for s in test.shapes]


def judge_colours(
    pictures: NDArray[np.uint8], prompts: Sequence[str], seeds: Sequence[int], asked: Sequence[str]
) -> list[ColourVerdict]:
    """One verdict for each of the pictures uint8 [B, H, W, 3]."""
    columns = zip(pictures, prompts, seeds, asked, strict=True)
    return [ColourVerdict(prompt, seed, colour, named_colour(picture)) for picture, prompt, seed, colour in columns]


def colour_accuracy(
    generate: Callable[[Sequence[str], Sequence[int]], NDArray[np.uint8]],
    seeds: Sequence[int] = (0, 1, 2, 3),
    test: ColourTest | None = None,
    batch_size: int = 32,
) -> tuple[float, list[ColourVerdict], NDArray[np.uint8]]:
    """Draw every prompt of the test with every seed and judge the dominant colour.

    Args:
        generate: (prompts, seeds) -> pictures uint8 [B, H, W, 3].
        seeds: the same for each prompt.
        test: the default has 25 prompts.
        batch_size: pictures a call.

    Returns:
        The share of hits, the verdicts prompt by prompt, and the pictures in the same order.
    """
    pairs = colour_prompts(test)
    prompts = [prompt for prompt, _ in pairs for _ in seeds]
    asked = [colour for _, colour in pairs for _ in seeds]
    all_seeds = [seed for _ in pairs for seed in seeds]
    batches = [slice(i, i + batch_size) for i in range(0, len(prompts), batch_size)]
    pictures = np.concatenate([generate(prompts[batch], all_seeds[batch]) for batch in batches])
    verdicts = judge_colours(pictures, prompts, all_seeds, asked)
    return float(np.mean([verdict.hit for verdict in verdicts])), verdicts, pictures
