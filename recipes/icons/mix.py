"""Which rows are drawn how often: the mix of a training set, as weights over the rows of icons.parquet."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.icons import shapes
from recipes.icons.colours import held_concepts
from recipes.icons.drawing import Drawn, draw_colour, draw_composition, draw_mono, geometry

Row = Mapping[str, Any]

EMOJI_SETS = {
    "noto",
    "noto-v1",
    "twemoji",
    "fluent-emoji-flat",
    "fluent-emoji",
    "fluent-emoji-3d",
    "emojione",
    "fxemoji",
    "streamline-emojis",
}
FLAG_SETS = {"flag", "flagpack", "circle-flags", "cif"}
# Clip art varies too much for a small model; the rest of the colour sets are flat and clean.
LEFT_OUT_SETS = {"openclipart"}
SHARES = {"emoji": 0.52, "colour": 0.12, "mono": 0.30, "composition": 0.06}
GEOMETRY_WEIGHT = 4.0
# The plain shapes are few rows: this makes them about every tenth one-colour sample.
SHAPE_WEIGHT = 24.0
# What is drawn in hardly any style is mostly interface jargon ("dock row"), which a small model cannot tell apart.
RARE, RARE_WEIGHT = 3, 0.2
MAIN_MONO_STYLES = {"solid", "solid emoji", "stencil emoji", "outline", "duotone", "pixel art"}


def kind_of(row: Row) -> str | None:
    """The group of the mix that a row belongs to; None for a row that is not drawn."""
    if not row["palette"]:
        return "mono"
    if row["set"] in LEFT_OUT_SETS:
        return None
    return "emoji" if row["set"] in EMOJI_SETS else "colour"


def _emoji_weight(row: Row) -> float:
    weight = 0.25 if row["tone"] else 1.0
    if row["group"].startswith("flags"):
        weight *= 0.15
    return weight * (GEOMETRY_WEIGHT if geometry(row) else 1.0)


def _colour_weight(row: Row) -> float:
    weight = 0.3 if row["set"] in FLAG_SETS else 1.0
    if row["junk"]:
        weight *= 0.2
    return weight * (GEOMETRY_WEIGHT if geometry(row) else 1.0)


def _mono_weight(row: Row, rows_of_concept: int, styles_of_concept: int) -> float:
    shape = geometry(row)
    if row["set"] == shapes.SET:
        return SHAPE_WEIGHT if shape else SHAPE_WEIGHT / 4
    # The one-colour forms of "red circle" or "white medium square" are hollow or hatched, and a flag is its colours.
    if row["hex"] and (row["phrase"].endswith((" circle", " square")) or row["group"].startswith("flags")):
        return 0.0
    weight = 1.0 if row["style"] in MAIN_MONO_STYLES else 0.3
    if row["style"] == "solid":
        weight *= 2
    if styles_of_concept < RARE:
        weight *= RARE_WEIGHT
    if shape:
        weight *= GEOMETRY_WEIGHT
    return float(weight / rows_of_concept**0.5)


@dataclass(frozen=True)
class Group:
    """Rows of one kind with the running sum of their weights."""

    rows: list[Row]
    cumulative: list[float]

    @classmethod
    def of(cls, rows: Sequence[Row], weights: Sequence[float]) -> Group:
        kept = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight > 0]
        return cls([row for row, _ in kept], list(itertools.accumulate(weight for _, weight in kept)))

    def pick(self, rng: random.Random) -> Row:
        return rng.choices(self.rows, cum_weights=self.cumulative)[0]


def weights_of(rows: Sequence[Row], kind: str) -> list[float]:
    """The weight of each row within its group."""
    if kind == "emoji":
        return [_emoji_weight(row) for row in rows]
    if kind == "colour":
        return [_colour_weight(row) for row in rows]
    counts = Counter(row["concept"] for row in rows)
    styles = Counter(concept for concept, _ in {(row["concept"], row["style"]) for row in rows})
    return [_mono_weight(row, counts[row["concept"]], styles[row["concept"]]) for row in rows]


def _composition_pool(rows: Sequence[Row]) -> list[Row]:
    """Objects that many sets draw, in looks that stay readable when small."""
    styles: dict[str, set[str]] = {}
    for row in rows:
        styles.setdefault(row["concept"], set()).add(row["style"])
    pool = []
    for row in rows:
        readable = row["set"] in EMOJI_SETS or row["style"] == "solid"
        plain = not row["group"].startswith(("symbols", "flags", "people")) and not row["junk"] and not row["tone"]
        short = len(row["phrase"].split()) <= 3
        if readable and plain and short and len(styles[row["concept"]]) >= 5 and row["set"] != shapes.SET:
            pool.append(row)
    return pool


class Mix:
    """Draws samples of a training set from rows, each from its own `random.Random`."""

    def __init__(self, rows: Sequence[Row]):
        """`rows` may be of any split; only those of the training split are ever used."""
        rows = [row for row in rows if row["split"] == "train"]
        self.groups: dict[str, Group] = {}
        for kind in ("emoji", "colour", "mono"):
            members = [row for row in rows if kind_of(row) == kind]
            if members:
                self.groups[kind] = Group.of(members, weights_of(members, kind))
        pool = _composition_pool(rows)
        if len({row["concept"] for row in pool}) > 1:
            counts = Counter(row["concept"] for row in pool)
            self.groups["composition"] = Group.of(pool, [counts[row["concept"]] ** -0.5 for row in pool])

    def draw(self, size: int, rng: random.Random) -> tuple[Drawn, list[Row]]:
        """One sample and the rows that it shows."""
        kinds = [kind for kind in SHARES if kind in self.groups]
        kind = rng.choices(kinds, [SHARES[k] for k in kinds])[0]
        group = self.groups[kind]
        first = group.pick(rng)
        if kind != "composition":
            return draw_row(first, size, rng), [first]
        second = group.pick(rng)
        while second["concept"] == first["concept"] or held_concepts(first["concept"], second["concept"]):
            second = group.pick(rng)
        drawn = draw_composition(first, second, size, rng)
        return drawn, drawn.facts.pop("rows")


def draw_row(row: Row, size: int, rng: random.Random) -> Drawn:
    """One row by itself."""
    if not row["palette"]:
        return draw_mono(row, size, rng)
    return draw_colour(row, size, kind_of(row) or "colour", rng)
