"""A block of ablations, as its TOML file says: a base recipe, and rows of changes to it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onestill.errors import RecipeError
from onestill.evaluate.samples import slug
from onestill.train.recipe import Recipe, fill, option, read_recipe


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training: `set` are changes to `base` (the block's, unless told), `paper` is what the paper found.

    It is drawn with in each of `steps`, by `sampler` (the model's own, unless told).
    """

    name: str
    paper: str
    set: list[str] = option([])
    base: str = option("")
    sampler: str = option("")
    steps: list[int] = option([1], low=1, high=50)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows that are trained, drawn with and measured alike; the first are the most important.

    `set` are changes to every row, which may speak of `[loop]` and `[data]` alone where methods differ. `claim` names
    the row that is expected to beat those of `beats`. The teacher is measured too, in each of `teacher_steps`.
    """

    title: str
    paper: str
    base: str
    set: list[str] = option([])
    row: list[Row] = option([])
    claim: str = option("")
    beats: list[str] = option([])
    captions: int = option(600, low=12)
    teacher_steps: list[int] = option([], low=1, high=50)
    teacher_guidance: float = option(3.0, low=1.0, high=50.0)


@dataclass(frozen=True)
class Trained:
    """A row that was trained: its model in diffusers' and OpenVINO's form, and what its log said last."""

    row: Row
    recipe: Recipe
    model: Path
    seconds: float
    last: dict[str, Any]


def read_block(path: Path) -> Block:
    """Read and check a block, every row's changes against its recipe too.

    Raises:
        RecipeError: a key or a value is wrong, here or in a row's recipe.
    """
    block = fill(Block, tomllib.loads(path.read_text(encoding="utf-8")), path.stem)
    names = [slug(row.name) for row in block.row]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"{path} needs rows whose names differ by more than punctuation.")
    for name in (*([block.claim] if block.claim else []), *block.beats):
        if name not in [row.name for row in block.row]:
            raise RecipeError(f"{path} compares with a row '{name}' that it does not have.")
    for row in block.row:
        row_recipe(path, block, row)
    return block


def row_base(path: Path, block: Block, row: Row) -> Path:
    """The recipe that a row of the block at `path` changes; named from the block's folder."""
    return path.parent / (row.base or block.base)


def row_recipe(path: Path, block: Block, row: Row, more: Sequence[str] = ()) -> Recipe:
    """A row's recipe with all its changes: the block's, the row's, and `more`."""
    return read_recipe(row_base(path, block, row), [*block.set, *row.set, *more])
