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
    COLOURS,
    TINTS,
    apart,
    choose_pair,
    clear_background,
    contrast,
    held_pair,
    jitter,
)

Row = Mapping[str, Any]
Pixels = npt.NDArray[np.uint8]
Canvas = npt.NDArray[np.float32]
_OPTIONS = usvg.Options.default()
# resvg takes its transform row by row; in the usual column order the identity would draw nothing, without an error.
_IDENTITY = (1, 0, 0, 0, 1, 0)
# Of the picture's side, on every side: nothing touches an edge, and one caption has one picture.
MARGIN, MONO_MARGIN = 0.055, 0.09
TINTED_SHARE = 0.16
GROUND_SHARE = 0.06
GROUNDS = ("light blue", "yellow", "pink", "lavender", "beige", "green", "blue", "red", "orange", "black", "teal")


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


def rgba(row: Row, size: int) -> Pixels:
    """The icon of a row as uint8 RGBA [size, size, 4]."""
    if row["img"]:
        picture = Image.open(io.BytesIO(row["img"])).convert("RGBA")
        return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))
    return rasterise(row["svg"], size)


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
    """An emoji in its own colours, or now and then in another that its caption names, nearly always on white."""
    icon = rgba(row, size - 2 * round(size * MARGIN))
    tint = None
    if rng.random() < TINTED_SHARE:
        colour = rng.choice([name for name in TINTS if not held_pair(row["concept"], name)])
        turned = recoloured(icon, colour)
        icon, tint = (icon, None) if turned is None else (turned, colour)
    measured = row["colors"] if tint is None else [tint]
    clear = [name for name in GROUNDS if clear_background(name, measured, tint)]
    background = rng.choice(clear) if clear and rng.random() < GROUND_SHARE else "white"
    canvas = _canvas(size, background, rng)
    _place(canvas, icon, round(size * MARGIN), round(size * MARGIN))
    caption = captions.caption_colour(row, background, tint, rng)
    return Drawn(canvas.clip(0, 255).astype(np.uint8), caption, kind, {"foreground": tint, "background": background})


def recoloured(icon: Pixels, colour: str) -> Pixels | None:
    """The icon [n, n, 4] with its main hue turned to that of `colour`, a name in TINTS; shading and greys stay.

    None where it has no main hue: too little of it is coloured, or it is in many colours.
    """
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(icon[..., :3]).convert("HSV")).astype(int), -1, 0)
    seen = icon[..., 3] > 128
    coloured = seen & (saturation > 64) & (value > 50)
    if coloured.sum() < 0.4 * max(1, seen.sum()):
        return None
    counts = np.bincount(hue[coloured] // 8, minlength=32)
    peak = int((counts + np.roll(counts, 1) + np.roll(counts, -1)).argmax()) * 8 + 4
    offset = (hue - peak + 128) % 256 - 128
    main = np.abs(offset) <= 24  # 34 degrees
    target = round(TINTS[colour] * 256)
    if (coloured & main).sum() < 0.7 * coloured.sum() or abs((target - peak + 128) % 256 - 128) < 16:
        return None
    if colour == "pink":
        saturation, value = saturation * 55 // 100, 255 - (255 - value) // 2
    turned = [((target + offset // 2) % 256), saturation, value]
    rgb = np.asarray(Image.merge("HSV", [Image.fromarray(band.astype(np.uint8)) for band in turned]).convert("RGB"))
    return np.concatenate([np.where(main[..., None], rgb, icon[..., :3]), icon[..., 3:]], -1)


def draw_mono(row: Row, size: int, rng: random.Random, kind: str = "mono") -> Drawn:
    """A one-colour icon in a named colour, three times out of four on white."""
    concepts = {row["concept"], geometry(row) or row["concept"]}
    foreground, background = choose_pair(concepts, rng.random() < 0.75, rng)
    canvas = _canvas(size, background, rng)
    margin = round(size * MONO_MARGIN)
    _place(canvas, _painted(row, size - 2 * margin, foreground, rng), margin, margin)
    caption = captions.caption_mono(row, foreground, background, rng)
    return Drawn(
        canvas.clip(0, 255).astype(np.uint8), caption, kind, {"foreground": foreground, "background": background}
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
