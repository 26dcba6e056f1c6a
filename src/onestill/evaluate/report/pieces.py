"""Pieces of the report page: pictures as data URIs, tables, sheets, cards. Every piece is a string of HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onestill.evaluate.measure import Figure, Result
from onestill.evaluate.report.charts import Point, Series, line_chart
from onestill.evaluate.report.model import Cell, Sheet
from onestill.evaluate.run import Evaluation

_MAX_PX = 160
_GROUP_COLOURS = {"student": "var(--student)", "teacher": "var(--teacher)", "real": "var(--real)"}
NONE = '<span class="none">&ndash;</span>'


def image(picture: NDArray[np.uint8], alt: str) -> str:
    """A picture uint8 [H, W, 3] as an inline WebP, at most 160 px on a side."""
    small = Image.fromarray(np.ascontiguousarray(picture))
    small.thumbnail((_MAX_PX, _MAX_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=86, method=4)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(alt)}" {size} loading="lazy">'


def strip(pictures: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> str:
    """A row of pictures without captions under them."""
    shown = "".join(image(picture, caption) for picture, caption in zip(pictures, captions, strict=True))
    return f'<div class="strip">{shown}</div>' if shown else ""


def section(name: str, title: str, text: str, body: str) -> str:
    """A section that the page's index can name."""
    paragraph = f"<p>{escape(text)}</p>" if text else ""
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>{paragraph}{body}</section>'


def sheet_html(sheet: Sheet) -> str:
    """A sheet as a matrix under its column names, or as a grid of groups."""
    return _matrix(sheet) if sheet.columns else _groups(sheet)


def _cell(cell: Cell, alt: str) -> str:
    label = f"<span>{escape(cell.label)}</span>" if cell.label else ""
    kind = "cell flag" if cell.flag else "cell"
    return f'<div class="{kind}">{image(cell.picture, alt)}{label}</div>'


def _matrix(sheet: Sheet) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in sheet.columns)
    rows = []
    for row in sheet.rows:
        cells = "".join(f"<td>{_cell(cell, row.caption)}</td>" for cell in row.cells)
        note = f"<small>{escape(row.note)}</small>" if row.note else ""
        rows.append(f'<tr><th scope="row">{escape(row.caption)}{note}</th>{cells}</tr>')
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    return f'<div class="matrix"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _groups(sheet: Sheet) -> str:
    groups = []
    for row in sheet.rows:
        cells = "".join(_cell(cell, row.caption) for cell in row.cells)
        note = f"<small>{escape(row.note)}</small>" if row.note else ""
        groups.append(f'<div class="group"><div class="cells">{cells}</div><p>{escape(row.caption)}{note}</p></div>')
    return f'<div class="groups">{"".join(groups)}</div>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of text, the first column a name."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_Column = tuple[str, str, float, int]
# head, field of Result, scale, direction: 1 the higher the better, -1 the lower, 0 neither
_COLUMNS: tuple[_Column, ...] = (
    ("Fréchet distance ↓", "frechet_distance", 1, -1),
    ("kernel distance x1000 ↓", "kernel_distance", 1000, -1),
    ("coverage ↑", "coverage", 100, 1),
    ("CLIP score ↑", "clip_score", 1, 1),
    ("retrieval % ↑", "retrieval", 100, 1),
    ("style % ↑", "style", 100, 1),
    ("diversity %", "diversity_share", 100, 0),
    ("colours % ↑", "colour", 100, 1),
    ("ms each", "ms_per_picture", 1, 0),
)


def _value(result: Result, field: str) -> float | None:
    found: Figure | float | None = getattr(result, field)
    return found.value if isinstance(found, Figure) else found


def _spread(result: Result, field: str, scale: float) -> str:
    found = getattr(result, field)
    if not isinstance(found, Figure) or found.low is None or found.high is None:
        return ""
    return f"<small>± {_short(scale * (found.high - found.low) / 2)}</small>"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def figures_table(evaluation: Evaluation) -> str:
    """Every contender's figures; the best of each column in bold, 95 % intervals beside."""
    columns = [column for column in _COLUMNS if any(_value(r, column[1]) is not None for r in evaluation.results)]
    best = {}
    for _, field, _, direction in columns:
        values = [value for result in evaluation.results if (value := _value(result, field)) is not None]
        if direction and len(values) > 1:
            best[field] = max(values) if direction > 0 else min(values)
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head, *_ in columns)
    rows = []
    for result in (*evaluation.results, evaluation.real):
        cells = []
        for _, field, scale, _ in columns:
            value = _value(result, field)
            if value is None:
                cells.append(f"<td>{NONE}</td>")
                continue
            kind = ' class="best"' if result.group != "real" and best.get(field) == value else ""
            cells.append(f"<td{kind}>{_short(scale * value)}{_spread(result, field, scale)}</td>")
        colour = _GROUP_COLOURS.get(result.group, "var(--other)")
        steps = str(result.num_inference_steps) if result.num_inference_steps else NONE
        guidance = f"{result.guidance_scale:g}" if result.guidance_scale > 1 else NONE
        name = f'<th scope="row"><i class="dot" style="--group: {colour}"></i>{escape(result.name)}</th>'
        group = escape(result.group) if result.group in _GROUP_COLOURS else "other"
        rows.append(f'<tr class="{group}">{name}<td>{steps}</td><td>{guidance}</td>{"".join(cells)}</tr>')
    head = f'<tr><th scope="col">contender</th><th scope="col">steps</th><th scope="col">guidance</th>{heads}</tr>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def charts(evaluation: Evaluation) -> str:
    """Fréchet distance and CLIP score over the number of steps, one line a group of contenders."""
    real = ("real", evaluation.real.clip_score.value)
    floor = ("real floor", evaluation.floor) if evaluation.floor is not None else None
    steps = "network calls (steps), logarithmic"
    distance = [one for one in _series(evaluation, "frechet_distance") if one.points]
    clip = [one for one in _series(evaluation, "clip_score") if one.points]
    drawn = []
    if distance:
        title = f"Fréchet distance ({evaluation.network}): lower is better"
        drawn.append(line_chart(distance, title=title, x_label=steps, reference=floor, log_y=True))
    if clip:
        drawn.append(line_chart(clip, title="CLIP score: higher is better", x_label=steps, reference=real))
    return f'<div class="charts">{"".join(drawn)}</div>'


def _series(evaluation: Evaluation, field: str) -> list[Series]:
    found = []
    for group in dict.fromkeys(result.group for result in evaluation.results):
        points = []
        for result in evaluation.results:
            figure = getattr(result, field)
            if result.group == group and isinstance(figure, Figure):
                points.append(Point(result.num_inference_steps, figure.value, figure.low, figure.high))
        colour = _GROUP_COLOURS.get(group, "var(--other)")
        found.append(Series(group or "contenders", tuple(sorted(points, key=lambda point: point.x)), colour))
    return found
