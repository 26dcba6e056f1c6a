"""What a report holds: sheets of pictures, targets, small tables, and how all of it was made.

Shapes: H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from onestill.evaluate.run import Evaluation


@dataclass(frozen=True)
class Cell:
    """One picture uint8 [H, W, 3] of a sheet.

    Attributes:
        label: said under it; "" for none.
        flag: it is a miss and is marked as one.
    """

    picture: NDArray[np.uint8]
    label: str = ""
    flag: bool = False


@dataclass(frozen=True)
class Row:
    """Pictures that belong together, under one caption."""

    caption: str
    cells: tuple[Cell, ...]
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """Rows of pictures under captions.

    Attributes:
        title: heads the section.
        text: one paragraph on how the pictures came to be there.
        columns: names the cells of every row; empty for a grid of captioned groups.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Target:
    """Something the evaluation was to show, and whether it did.

    Attributes:
        what: e.g. "one-step Fréchet distance against the teacher's at 50 steps".
        measured: e.g. "1.18x".
        limit: e.g. "at most 1.25x".
        met: whether it is within the limit.
        note: interval, or by how much it was missed.
    """

    what: str
    measured: str
    limit: str
    met: bool
    note: str = ""


@dataclass(frozen=True)
class Tried:
    """A small table of what was tried, e.g. the guidance scales of a sweep."""

    title: str
    text: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class About:
    """What a reader must know to judge the figures and to repeat them.

    Attributes:
        title: heads the page.
        lead: one or two sentences.
        sets: name -> where the prompts, pictures and networks come from and how many there are.
        command: the line that makes the report again.
        seed: the first of the prompts' seeds.
        machine: see `onestill.bench.machine.machine_for_report`.
        versions: see `onestill.bench.machine.versions`.
        caveats: what the figures do not say.
    """

    title: str
    lead: str
    sets: Mapping[str, str]
    command: str
    seed: int
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `write_report` writes, in the page's order.

    Attributes:
        about: title, lead, and how it was made.
        evaluation: the figures.
        targets: may be empty.
        sheets: anchor -> sheet.
        tried: small tables.
        hero: contender whose kept pictures head the page; "" for none.
    """

    about: About
    evaluation: Evaluation
    targets: Sequence[Target] = ()
    sheets: Mapping[str, Sheet] = field(default_factory=dict)
    tried: Sequence[Tried] = ()
    hero: str = ""
