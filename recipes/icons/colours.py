"""The named colours of the captions: which go together, and which pairs are kept for testing only."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "black": (20, 20, 22),
    "gray": (130, 132, 138),
    "light gray": (205, 207, 211),
    "white": (255, 255, 255),
    "red": (218, 40, 45),
    "dark red": (140, 25, 35),
    "orange": (245, 135, 30),
    "yellow": (252, 205, 45),
    "brown": (120, 72, 45),
    "beige": (235, 215, 180),
    "green": (55, 165, 70),
    "dark green": (25, 95, 50),
    "lime green": (160, 215, 50),
    "teal": (20, 150, 145),
    "turquoise": (60, 205, 200),
    "light blue": (140, 195, 250),
    "blue": (45, 110, 225),
    "navy blue": (30, 45, 110),
    "purple": (125, 65, 185),
    "lavender": (190, 165, 240),
    "magenta": (215, 45, 150),
    "pink": (250, 150, 185),
}
# Names that `colours_of` gives to pixels and that are not in the table above.
MEASURED: dict[str, Colour] = {
    "dark gray": (75, 75, 80),
    "gold": (205, 150, 35),
    "cream": (250, 230, 190),
    "tan": (205, 160, 115),
    "lime": (160, 215, 50),
    "cyan": (60, 205, 225),
    "navy": (30, 45, 110),
}
MAIN = {"red", "green", "blue", "yellow", "purple", "orange", "pink", "black"}
WEIGHTS = {name: 2.0 if name in MAIN else 1.0 for name in COLOURS}
PALE = {"white", "beige", "light gray"}
TINTS = {
    "red": 0.99,
    "orange": 0.07,
    "yellow": 0.135,
    "green": 0.36,
    "teal": 0.49,
    "blue": 0.6,
    "purple": 0.75,
    "magenta": 0.86,
    "pink": 0.93,
}
_FAMILIES: tuple[set[str], ...] = (
    {"red", "dark red"},
    {"green", "dark green", "lime green"},
    {"blue", "light blue", "navy blue"},
    {"gray", "light gray"},
    {"black", "navy blue"},
    {"black", "dark green"},
    {"black", "brown"},
    {"black", "purple"},
    {"beige", "light gray", "white"},
    {"pink", "magenta", "lavender"},
    {"teal", "turquoise", "green"},
    {"white", "lavender"},
)


def luminance(colour: Colour) -> float:
    """Relative luminance in [0, 1] with a gamma of 2.2."""
    return sum(float(w * (v / 255) ** 2.2) for w, v in zip((0.2126, 0.7152, 0.0722), colour, strict=True))


def contrast(a: str, b: str) -> float:
    """The contrast ratio of two named colours, from 1 to 21."""
    low, high = sorted((luminance(COLOURS[a]) + 0.05, luminance(COLOURS[b]) + 0.05))
    return high / low


def apart(foreground: str, background: str) -> bool:
    """Whether a person would name these as two clearly different colours."""
    if foreground == background:
        return False
    if background == "white":
        return foreground not in PALE
    ratio = contrast(foreground, background)
    related = any(foreground in family and background in family for family in _FAMILIES)
    return ratio >= (5 if related else 2.4)


def _share(text: str) -> int:
    return int(hashlib.sha1(text.encode()).hexdigest()[:8], 16)


def held_pair(concept: str, colour: str) -> bool:
    """Whether this (concept, colour) is one of the 5 % that are never trained on."""
    return _share(f"{concept}|{colour}") % 20 == 0


def held_colours(foreground: str, background: str) -> bool:
    """Whether this (foreground, background) is one of the 10 % that are never trained on; no white background is."""
    return background != "white" and _share(f"colours|{foreground}|{background}") % 10 == 0


def held_concepts(first: str, second: str) -> bool:
    """Whether these two concepts, in either order, are one of the 5 % never put into one picture."""
    return _share("concepts|" + "|".join(sorted((first, second)))) % 20 == 0


def choose_pair(concepts: Collection[str], on_white: bool, rng: random.Random) -> tuple[str, str]:
    """A trainable (foreground, background) for an icon that is known by `concepts`."""
    names = list(COLOURS)
    weights = [WEIGHTS[name] for name in names]
    while True:
        foreground = rng.choices(names, weights)[0]
        background = "white" if on_white else rng.choice(names)
        if background == "white" and not on_white:
            continue
        if (
            apart(foreground, background)
            and not any(held_pair(concept, foreground) for concept in concepts)
            and not held_colours(foreground, background)
        ):
            return foreground, background


def jitter(colour: Colour, rng: random.Random, spread: float = 7.0) -> Colour:
    """The colour, moved a little: nobody means one exact RGB by a name."""
    red, green, blue = (int(min(255, max(0, value + rng.gauss(0, spread)))) for value in colour)
    return red, green, blue


def clear_background(background: str, measured: list[str], tint: str | None) -> bool:
    """Whether `background` differs clearly from the main colours of a picture (as `measured`, most frequent first)."""
    if tint is not None:
        pinks = {"magenta", "pink", "lavender", "purple"}
        return tint not in background and not (background in pinks and tint in pinks)
    main = measured[:2] + (["black"] if measured[:1] == ["black"] else [])
    for name in main:
        other = COLOURS.get(name) or MEASURED[name]
        if sum((x - y) ** 2 for x, y in zip(COLOURS[background], other, strict=True)) ** 0.5 < 110:
            return False
    return True
