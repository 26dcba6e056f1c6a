"""Line charts as inline SVG, coloured by the page's own variables so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 92, 18, 44
_GAP = 15.0  # px between two labels at the lines' ends


@dataclass(frozen=True)
class Point:
    """A value over `x`, with its interval where one is known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points joined by a line; `colour` is a CSS colour."""

    name: str
    points: tuple[Point, ...]
    colour: str


class _Scale:
    """Numbers to pixels, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool) -> None:
        self.log = log
        self.low, self.high = (math.log(low), math.log(high)) if log else (low, high)
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        # A logarithm of nothing lies at the bottom: the distance of a set to itself.
        place = max(math.log(value), self.low) if self.log and value > 0 else self.low if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.stop - self.start)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within [low, high], about five."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
            if len(found) >= 3:
                return found
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    reference: tuple[str, float] | None = None,
    log_y: bool = False,
) -> str:
    """A chart of one figure over the number of steps (logarithmic), names written at the lines' ends.

    Args:
        series: at least one with at least one point; every x > 0.
        title: said above and to screen readers.
        x_label: under the axis.
        reference: a named horizontal line.
        log_y: a logarithmic second axis; needs every y >= 0; 0 is drawn at the bottom.
    """
    points = [point for one in series for point in one.points]
    xs = sorted({point.x for point in points})
    ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    ys += [reference[1]] if reference else []
    if log_y:
        ys = [y for y in ys if y > 0] or [1.0]
        low, high = min(ys) / 1.15, max(ys) * 1.15
    else:
        pad = (max(ys) - min(ys) or 1.0) * 0.12
        low, high = min(ys) - pad, max(ys) + pad
    x = _Scale(xs[0] / 1.2, xs[-1] * 1.2, _LEFT, _WIDTH - _RIGHT, log=True)
    y = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP, log_y)
    parts = [_axes(x, y, xs, _ticks(low, high, log_y), x_label)]
    ends: list[tuple[float, str, str]] = []
    if reference:
        at = y(reference[1])
        parts.append(f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        ends.append((at, reference[0], "var(--muted)"))
    for one in series:
        parts.append(_line(one, x, y, low))
        ends.append((y(one.points[-1].y), one.name, one.colour))
    parts.append(_end_labels(ends))
    label = escape(title)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption>{label}</figcaption>{svg}</figure>'


def _axes(x: _Scale, y: _Scale, xs: list[float], y_ticks: list[float], x_label: str) -> str:
    parts = []
    for tick in y_ticks:
        at = y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 10}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    base = _HEIGHT - _BOTTOM
    for value in xs:
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{base + 20}" text-anchor="middle">{value:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _line(one: Series, x: _Scale, y: _Scale, floor: float) -> str:
    path = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in one.points)
    parts = [f'<g style="--line: {one.colour}"><polyline points="{path}"/>']
    for point in one.points:
        at = f"{x(point.x):.1f}"
        if point.low is not None and point.high is not None:
            ends = f'y1="{y(max(point.low, floor)):.1f}" y2="{y(point.high):.1f}"'
            parts.append(f'<line class="interval" x1="{at}" x2="{at}" {ends}/>')
        steps = f"{one.name}, {point.x:g}: {point.y:.4g}"
        parts.append(f'<circle cx="{at}" cy="{y(point.y):.1f}" r="4.5"><title>{escape(steps)}</title></circle>')
    return "".join(parts) + "</g>"


def _end_labels(ends: list[tuple[float, str, str]]) -> str:
    """Names at the right, pushed apart where lines end close together."""
    ends = sorted(ends)
    places: list[float] = []
    for at, _, _ in ends:
        places.append(max(at, places[-1] + _GAP) if places else at)
    over = max(0.0, places[-1] - (_HEIGHT - _BOTTOM)) if places else 0.0
    parts = []
    for place, (_, name, colour) in zip(places, ends, strict=True):
        where = f'x="{_WIDTH - _RIGHT + 10}" y="{place - over + 4:.1f}"'
        parts.append(f'<text class="name" {where} style="fill: {colour}">{escape(name)}</text>')
    return "".join(parts)
