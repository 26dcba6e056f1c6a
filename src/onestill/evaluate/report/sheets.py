"""Sheets of pictures for a report: the same prompts and seeds side by side, nothing picked by hand."""

from __future__ import annotations

from collections.abc import Sequence

from onestill.errors import DataError
from onestill.evaluate.report.model import Cell, Row, Sheet
from onestill.evaluate.run import Evaluation


def _indices(evaluation: Evaluation, name: str) -> tuple[int, ...]:
    if name not in evaluation.protocol.sheets:
        have = ", ".join(evaluation.protocol.sheets) or "none"
        raise DataError(f"the protocol keeps no pictures for a sheet '{name}'; it has: {have}")
    return evaluation.protocol.sheets[name]


def side_by_side(evaluation: Evaluation, sheet: str, title: str, text: str, names: Sequence[str] = ()) -> Sheet:
    """One row a prompt: the real picture, then every contender's from the same seed.

    Args:
        evaluation: what was drawn.
        sheet: a name in `Protocol.sheets`.
        title: of the section.
        text: its paragraph.
        names: contenders, in this order; default: all.
    """
    names = list(names) or [result.name for result in evaluation.results]
    column = {index: place for place, index in enumerate(evaluation.protocol.kept)}
    rows = []
    for index in _indices(evaluation, sheet):
        pictures = [evaluation.reference.kept[column[index]]]
        pictures += [evaluation.pictures(name).kept[column[index]] for name in names]
        note = f"seed {evaluation.protocol.seeds[index]}"
        rows.append(Row(evaluation.protocol.prompts[index], tuple(Cell(picture) for picture in pictures), note))
    return Sheet(title, text, ("real", *names), tuple(rows))


def beside_real(evaluation: Evaluation, sheet: str, name: str, title: str, text: str) -> Sheet:
    """A grid of pairs: the real picture and what `name` drew from its caption."""
    column = {index: place for place, index in enumerate(evaluation.protocol.kept)}
    drawn = evaluation.pictures(name)
    rows = []
    for index in _indices(evaluation, sheet):
        real, made = evaluation.reference.kept[column[index]], drawn.kept[column[index]]
        cells = (Cell(real, "real"), Cell(made, "drawn"))
        rows.append(Row(evaluation.protocol.prompts[index], cells))
    return Sheet(title, text, (), tuple(rows))


def several_seeds(evaluation: Evaluation, names: Sequence[str], title: str, text: str) -> Sheet:
    """One row a prompt: every diversity seed of the first contender, then of the next."""
    columns = tuple(f"{name}, seed {seed}" for name in names for seed in evaluation.protocol.diversity_seeds)
    shown = [evaluation.pictures(name).diversity_pictures for name in names]
    rows = []
    # Only the first few of the prompts have their pictures kept.
    for groups in zip(evaluation.protocol.diversity_indices, *shown, strict=False):
        cells = tuple(Cell(picture) for pictures in groups[1:] for picture in pictures)
        rows.append(Row(evaluation.protocol.prompts[groups[0]], cells))
    return Sheet(title, text, columns, tuple(rows))


def colour_sheet(evaluation: Evaluation, name: str, title: str, text: str) -> Sheet:
    """The colour test of one contender: a group of seeds a prompt, misses flagged with the colour seen instead."""
    pictures, verdicts = evaluation.pictures(name).colour_pictures, evaluation.result(name).colour_verdicts
    groups: dict[str, list[Cell]] = {}
    for picture, verdict in zip(pictures, verdicts, strict=True):
        label = "" if verdict.hit else (verdict.seen or "empty")
        groups.setdefault(verdict.prompt, []).append(Cell(picture, label, not verdict.hit))
    return Sheet(title, text, (), tuple(Row(prompt, tuple(cells)) for prompt, cells in groups.items()))


def failures(evaluation: Evaluation, name: str, title: str, text: str) -> Sheet:
    """The pictures with the lowest CLIP scores of one contender, worst first."""
    drawn = evaluation.pictures(name)
    rows = []
    for index, score, picture in zip(drawn.worst, drawn.worst_scores, drawn.worst_pictures, strict=True):
        rows.append(Row(evaluation.protocol.prompts[index], (Cell(picture),), f"CLIP score {score:.1f}"))
    return Sheet(title, text, (), tuple(rows))
