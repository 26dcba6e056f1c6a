"""Pictures from icon rows: rasterise, colour, place one or more on a background."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import resvg
from PIL import Image
from resvg import usvg

from recipes.icons import captions
from recipes.icons.colours import (
    BLUISH,
    COLOURS,
    TINTS,
    apart,
    choose_pair,
    clear_background,
    contrast,
    held_pair,
    jitter,
    tinted,
)

Row = Mapping[str, Any]
Pixels = npt.NDArray[np.uint8]
Canvas = npt.NDArray[np.float32]
_OPTIONS = usvg.Options.default()
# resvg takes its transform row by row; in the usual column order the identity would draw nothing, without an error.
_IDENTITY = (1, 0, 0, 0, 1, 0)


@dataclass
class Drawn:
    """A picture, uint8 [n, n, 3], what it shows in words, and the facts that go into its JSON."""

    picture: Pixels
    caption: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)


def rasterise(svg: str, size: int, colour: str = "#000") -> Pixels:
    """The drawing as uint8 RGBA [size, size, 4], `currentColor` being `colour`.

    Raises ValueError if it cannot be read.
    """
    root = svg.replace("<svg ", f'<svg color="{colour}" width="{size}" height="{size}" ', 1)
    try:
        png = resvg.render(usvg.Tree.from_str(root, _OPTIONS), _IDENTITY)
    except BaseException as error:
        # A panic of resvg's Rust code is no Exception, and its type cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"resvg cannot draw it: {error}") from error
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def rgba(row: Row, size: int, svg: str | None = None) -> Pixels:
    """The icon of a row as uint8 RGBA [size, size, 4]; `svg` stands in for the row's own drawing."""
    if row["img"]:
        picture = Image.open(io.BytesIO(row["img"])).convert("RGBA")
        return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))
    return rasterise(svg if svg is not None else row["svg"], size)


def _canvas(size: int, background: str, rng: random.Random) -> Canvas:
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = COLOURS["white"] if background == "white" else jitter(COLOURS[background], rng)
    return canvas


def _place(canvas: Canvas, icon: Pixels, x: int, y: int) -> None:
    height, width = icon.shape[:2]
    part = canvas[y : y + height, x : x + width]
    alpha = icon[..., 3:].astype(np.float32) / 255
    part[:] = part * (1 - alpha) + icon[..., :3] * alpha


def _painted(row: Row, size: int, colour: str, rng: random.Random) -> Pixels:
    icon = rgba(row, size)
    if not row["palette"]:
        icon = icon.copy()
        icon[..., :3] = jitter(COLOURS[colour], rng)
    return icon


def draw_colour(row: Row, size: int, kind: str, rng: random.Random) -> Drawn:
    """An icon in its own colours, or turned to another hue where its palette allows, mostly on white."""
    tint = None
    if row["recolour"] and BLUISH & set(row["colors"]) and rng.random() < 0.5:
        tint = rng.choice([t for t in TINTS if not held_pair(row["concept"], t)])
    clear = [name for name in COLOURS if name != "white" and clear_background(name, row["colors"], tint)] or ["blue"]
    white = rng.random() < 0.75 and row["colors"][:1] != ["white"]
    background = "white" if white else rng.choice(clear)
    canvas = _canvas(size, background, rng)
    margin = int(size * rng.uniform(0.02, 0.09))
    icon = rgba(row, size - 2 * margin, tinted(row["svg"], tint) if tint is not None and row["svg"] else None)
    _place(canvas, icon, margin, margin)
    caption = captions.caption_colour(row, background, tint, rng)
    return Drawn(canvas.clip(0, 255).astype(np.uint8), caption, kind, {"foreground": tint, "background": background})


def draw_mono(row: Row, size: int, rng: random.Random) -> Drawn:
    """A one-colour icon in a named colour, half of the time on white."""
    concepts = {row["concept"], geometry(row) or row["concept"]}
    foreground, background = choose_pair(concepts, rng.random() < 0.5, rng)
    canvas = _canvas(size, background, rng)
    margin = int(size * rng.uniform(0.05, 0.15))
    _place(canvas, _painted(row, size - 2 * margin, foreground, rng), margin, margin)
    caption = captions.caption_mono(row, foreground, background, rng)
    return Drawn(
        canvas.clip(0, 255).astype(np.uint8), caption, "mono", {"foreground": foreground, "background": background}
    )


def geometry(row: Row) -> str | None:
    """The plain shape that a row shows and nothing else, or None."""
    phrase: str = row["phrase"]
    if row["palette"]:
        *before, noun = phrase.split()
        return noun if noun in captions.SHAPES and (not before or " ".join(before) in COLOURS) else None
    phrase = captions.phrase_of(row)
    return phrase if phrase in captions.SHAPES else None


_BACKGROUNDS = ("white",) * 8 + (
    "light gray",
    "beige",
    "light blue",
    "lavender",
    "yellow",
    "black",
    "navy blue",
    "pink",
    "teal",
)
_LAYOUTS = ("left", "right", "above", "below") * 2 + ("big", "count", "inside")


def _trainable_colours(row: Row, background: str) -> list[str]:
    return [c for c in COLOURS if apart(c, background) and not held_pair(row["concept"], c)]


def draw_composition(first: Row, second: Row, size: int, rng: random.Random) -> Drawn:
    """Two icons, or several copies of one, in a stated relation that holds exactly."""
    background = rng.choice(_BACKGROUNDS)
    colour = rng.choice(_trainable_colours(first, background))
    other = rng.choice([c for c in _trainable_colours(second, background) if c != colour])
    canvas = _canvas(size, background, rng)
    layout = rng.choice(_LAYOUTS)
    rows: list[Row] = [first, second]
    if layout == "count":
        text = _draw_count(canvas, first, colour, rng)
    elif layout == "inside":
        text = _draw_inside(canvas, first, colour, background, rng)
    else:
        icons = ((first, colour), (second, other))
        text = _draw_big(canvas, icons, rng) if layout == "big" else _draw_pair(canvas, icons, layout, rng)
    if layout in ("count", "inside"):
        rows = [first]
    facts = {"layout": layout, "background": background, "rows": rows}
    return Drawn(
        canvas.clip(0, 255).astype(np.uint8), captions.on_background(text, background, rng), "composition", facts
    )


Painted = tuple[tuple[Row, str], tuple[Row, str]]


def _name(row: Row, colour: str) -> str:
    phrase = captions.phrase_of(row)
    return phrase if row["palette"] else f"{colour} {phrase}"


def _draw_pair(canvas: Canvas, icons: Painted, layout: str, rng: random.Random) -> str:
    size = canvas.shape[0]
    side = int(size * 0.42)
    low = int(size * 0.06)
    high, middle = size - low - side, (size - side) // 2
    along = (low, high) if layout in ("left", "above") else (high, low)
    for (row, colour), place in zip(icons, along, strict=True):
        across = middle + int(rng.uniform(-0.05, 0.05) * size)
        x, y = (place, across) if layout in ("left", "right") else (across, place)
        _place(canvas, _painted(row, side, colour, rng), x, y)
    names = [captions.with_article(_name(row, colour)) for row, colour in icons]
    return captions.RELATIONS[layout].format(*names)


def _draw_big(canvas: Canvas, icons: Painted, rng: random.Random) -> str:
    size = canvas.shape[0]
    big, small = int(size * 0.58), int(size * 0.26)
    left = rng.random() < 0.5
    floor = size - int(size * 0.12)
    (row, colour), (row2, colour2) = icons
    near, far = int(size * 0.04), int(size * 0.06)
    _place(canvas, _painted(row, big, colour, rng), near if left else size - near - big, floor - big)
    _place(canvas, _painted(row2, small, colour2, rng), size - far - small if left else far, floor - small)
    return f"a big {_name(row, colour)} next to a small {_name(row2, colour2)}"


def _draw_count(canvas: Canvas, row: Row, colour: str, rng: random.Random) -> str:
    size = canvas.shape[0]
    count = rng.choice((2, 3, 4))
    side = int(size * {2: 0.4, 3: 0.28, 4: 0.36}[count])
    if count == 4:
        middles = [(0.28 + 0.44 * (i % 2), 0.28 + 0.44 * (i // 2)) for i in range(4)]
    else:
        middles = [((i + 0.5) / count, 0.5) for i in range(count)]
    icon = _painted(row, side, colour, rng)
    for x, y in middles:
        _place(canvas, icon, int(size * x) - side // 2, int(size * y) - side // 2)
    return f"{captions.NUMBERS[count]} {captions.plural(_name(row, colour))}"


def _draw_inside(canvas: Canvas, row: Row, colour: str, background: str, rng: random.Random) -> str:
    size = canvas.shape[0]
    fits = [
        c
        for c in COLOURS
        if apart(c, background) and (row["palette"] or contrast(colour, c) > 2) and not held_pair("circle", c)
    ]
    clear = [c for c in fits if not row["palette"] or clear_background(c, row["colors"], None)]
    disc = rng.choice(clear or fits or ["gray"])
    y, x = np.mgrid[:size, :size]
    distance = np.hypot(x - size / 2 + 0.5, y - size / 2 + 0.5)
    weight = np.clip(size * 0.44 - distance + 0.5, 0, 1)[..., None].astype(np.float32)
    canvas[:] = canvas * (1 - weight) + np.array(COLOURS[disc], np.float32) * weight
    side = int(size * 0.54)
    place = (size - side) // 2
    _place(canvas, _painted(row, side, colour, rng), place, place)
    return f"{captions.with_article(_name(row, colour))} inside {captions.with_an(disc)} circle"
