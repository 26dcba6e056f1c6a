"""Which rows are drawn how often: the mix of a training set, as weights over the rows of icons.parquet.

Emoji first: what people ask a small model for, each seen often. Beside them one-colour icons of the same things, plain
shapes, and a few pictures of two things. Interface icons of other things, clip art, skin tones and flags of single sets
stay out: twenty thousand things in fifty styles are more than a small model can learn.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.icons import shapes
from recipes.icons.colours import held_concepts
from recipes.icons.drawing import Drawn, draw_colour, draw_composition, draw_mono, geometry

Row = Mapping[str, Any]

# The drawn styles of emoji. Words without a style draw the first that has the thing.
EMOJI_SETS = (
    "fluent-emoji-3d",
    "fluent-emoji",
    "fluent-emoji-flat",
    "noto",
    "twemoji",
    "emojione",
    "noto-v1",
    "fxemoji",
    "streamline-emojis",
)
MONO_STYLES = ("solid", "outline", "pixel art", "solid emoji", "stencil emoji")
SHARES = {"emoji": 0.72, "mono": 0.19, "shape": 0.05, "composition": 0.04}
DEFAULT_LOOK_WEIGHT = 1.7
# Two of a thing in one style are enough: more would only tell the model that one caption has many pictures.
MOST_MONO = 2
_PEOPLE = re.compile(r"^(deaf )?(man|men|woman|women|person|people|family|kiss|couple)\b")


def kinds_of(rows: Sequence[Row]) -> list[str | None]:
    """The group of the mix that each row belongs to; None for a row that is not drawn, whatever its split."""
    things = {row["concept"] for row in rows if row["set"] in EMOJI_SETS and _is_base(row)}
    seen: Counter[tuple[str, str]] = Counter()
    kinds: list[str | None] = []
    for row in rows:
        kind = None
        if row["set"] == shapes.SET:
            kind = "shape"
        elif row["set"] in EMOJI_SETS and _is_base(row):
            kind = "emoji"
        elif not row["palette"] and row["style"] in MONO_STYLES and row["concept"] in things and _is_icon(row):
            seen[row["concept"], row["style"]] += 1
            kind = "mono" if seen[row["concept"], row["style"]] <= MOST_MONO else None
        kinds.append(kind)
    return kinds


def _is_base(row: Row) -> bool:
    """Whether an emoji is drawn at all: not in another skin tone, and no flag."""
    return not row["tone"] and not row["group"].startswith(("flags", "component"))


def _is_icon(row: Row) -> bool:
    """Whether a one-colour icon shows the thing of its name: the forms of "red circle" are hollow or hatched."""
    if row["hex"] and (not _is_base(row) or row["phrase"].endswith((" circle", " square"))):
        return False
    return len(row["phrase"].split()) <= 4 and not row["junk"]


def mark_default_look(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with `default_look` added: true for the one emoji of each thing that words without a style draw."""
    best: dict[str, tuple[int, str]] = {}
    for row in rows:
        if row["hex"] and row["set"] in EMOJI_SETS and _is_base(row):
            rank = (EMOJI_SETS.index(row["set"]), row["id"])
            best[row["hex"]] = min(best.get(row["hex"], rank), rank)
    chosen = {name for _, name in best.values()}
    return [{**row, "default_look": row["id"] in chosen} for row in rows]


@dataclass(frozen=True)
class Group:
    """Rows of one kind with the running sum of their weights."""

    rows: list[Row]
    cumulative: list[float]

    @classmethod
    def of(cls, rows: Sequence[Row], weights: Sequence[float]) -> Group:
        drawn = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight > 0]
        return cls([row for row, _ in drawn], list(itertools.accumulate(weight for _, weight in drawn)))

    def pick(self, rng: random.Random) -> Row:
        return rng.choices(self.rows, cum_weights=self.cumulative)[0]


def weights_of(rows: Sequence[Row], kind: str) -> list[float]:
    """The weight of each row within its group."""
    if kind == "emoji":
        return [_emoji_weight(row) for row in rows]
    counts = Counter(row["concept"] for row in rows)
    return [(4.0 if kind == "shape" and geometry(row) else 1.0) / counts[row["concept"]] ** 0.5 for row in rows]


def _emoji_weight(row: Row) -> float:
    weight = DEFAULT_LOOK_WEIGHT if row["default_look"] else 1.0
    if _PEOPLE.match(row["phrase"]):
        weight *= 0.4  # a third of all emoji are the same few people doing everything
    if "alphanum" in row["group"] or "keypad" in row["group"] or "family" in row["group"]:
        weight *= 0.4
    return weight


def _composition_pool(rows: Sequence[Row], kinds: Sequence[str | None]) -> list[Row]:
    """Objects that many sets draw, in looks that stay readable when small."""
    styles = defaultdict(set)
    for row in rows:
        styles[row["concept"]].add(row["style"])
    return [
        row
        for row, kind in zip(rows, kinds, strict=True)
        if (kind == "emoji" or (kind == "mono" and row["style"].startswith("solid")))
        and not row["group"].startswith(("symbols", "people"))
        and len(row["phrase"].split()) <= 2
        and len(styles[row["concept"]]) >= 5
    ]


class Mix:
    """Draws samples of a training set from rows, each from its own `random.Random`."""

    def __init__(self, rows: Sequence[Row]):
        """`rows` may be of any split; only those of the training split are ever used."""
        rows = mark_default_look([row for row in rows if row["split"] == "train"])
        kinds = kinds_of(rows)
        self.groups: dict[str, Group] = {}
        for kind in ("emoji", "mono", "shape"):
            members = [row for row, its in zip(rows, kinds, strict=True) if its == kind]
            if members:
                self.groups[kind] = Group.of(members, weights_of(members, kind))
        pool = _composition_pool(rows, kinds)
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
    if row["palette"]:
        return draw_colour(row, size, "emoji", rng)
    return draw_mono(row, size, rng, "shape" if row["set"] == shapes.SET else "mono")
