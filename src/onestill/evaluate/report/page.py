"""An evaluation as one self-contained page and one JSON file.

The page needs no network: styles, charts and pictures are inside. It follows the reader's light or dark setting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onestill.checkpoint import written_whole
from onestill.errors import OutputError
from onestill.evaluate.report.html import render
from onestill.evaluate.report.sheets import Sheet
from onestill.evaluate.run import Evaluation

__all__ = ["About", "Report", "Target", "Tried", "write_report"]


@dataclass(frozen=True)
class Target:
    """Something the evaluation was to show, and whether it did.

    Attributes:
        what: e.g. "one-step FID against the teacher's at 50 steps".
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
        machine: see `onestill.bench.machine.machine_in_words`.
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


def write_report(report: Report, folder: Path | str) -> Path:
    """Write `index.html` and `report.json` into `folder`, each atomically.

    Returns:
        The page.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    created = datetime.now(UTC).replace(microsecond=0).isoformat()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "report.json", json.dumps(_facts(report, created), indent=1, ensure_ascii=False) + "\n")
        return _replace(folder / "index.html", render(report, created))
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror or error}); choose another folder") from error


def _replace(path: Path, text: str) -> Path:
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def _facts(report: Report, created: str) -> dict[str, Any]:
    evaluation = report.evaluation
    return {
        "format": "onestill.evaluation",
        "version": 1,
        "created": created,
        "about": asdict(report.about),
        "network": evaluation.network,
        "num_prompts": len(evaluation.protocol.prompts),
        "retrieval_among": evaluation.retrieval_among,
        "floor_fid": evaluation.floor,
        "real": asdict(evaluation.real),
        "results": [asdict(result) for result in evaluation.results],
        "targets": [asdict(target) for target in report.targets],
        "tried": [asdict(tried) for tried in report.tried],
    }
