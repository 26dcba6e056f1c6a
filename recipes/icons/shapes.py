"""Plain geometry as icon rows: icon sets file circles under interface parts, but people ask for "a red circle"."""

from __future__ import annotations

import math
from typing import Any

SET = "shapes"
ATTRIBUTION = {"name": "Plain shapes", "author": "the onestill project", "licence": "Apache-2.0"}
_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">'


def _polygon(corners: int, radius: float, turn: float, inner: float | None = None, middle: float = 12.0) -> str:
    """A regular polygon as path data, or a star with `corners` points whose notches lie at the `inner` radius."""
    count = corners if inner is None else 2 * corners
    points = []
    for i in range(count):
        r = radius if inner is None or i % 2 == 0 else inner
        angle = turn + 2 * math.pi * i / count
        points.append(f"{12 + r * math.sin(angle):.3f} {middle - r * math.cos(angle):.3f}")
    return "M" + "L".join(points) + "Z"


def _rectangle(width: float, height: float) -> str:
    x, y = 12 - width / 2, 12 - height / 2
    return f"M{x} {y}H{x + width}V{y + height}H{x}Z"


def _ellipse(rx: float, ry: float) -> str:
    return f"M{12 - rx} 12A{rx} {ry} 0 1 1 {12 + rx} 12A{rx} {ry} 0 1 1 {12 - rx} 12Z"


def _heart(width: float) -> str:
    """A heart: its lower tip, then four curves around it, as shares of half its width about the middle."""
    curves = (
        ((-0.75, 0.4), (-1.05, 0), (-1, -0.4)),
        ((-0.95, -1.1), (-0.15, -1.1), (0, -0.4)),
        ((0.15, -1.1), (0.95, -1.1), (1, -0.4)),
        ((1.05, 0), (0.75, 0.4), (0, 0.95)),
    )

    def point(x: float, y: float) -> str:
        return f"{12 + x * width / 2:.3f} {12 + y * width / 2:.3f}"

    return f"M{point(0, 0.95)}" + "".join("C" + " ".join(point(*p) for p in curve) for curve in curves) + "Z"


def _paths() -> dict[str, list[str]]:
    return {
        "circle": [_ellipse(11, 11), _ellipse(10, 10), _ellipse(9, 9)],
        "square": [_rectangle(20, 20), _rectangle(18, 18), _rectangle(16, 16)],
        "triangle": [_polygon(3, 12, 0, middle=14), "M12 3L22 21H2Z", "M12 2L21 22H3Z"],
        "star": [_polygon(5, 11.5, 0, 4.6, 12.8), _polygon(5, 11, 0, 5.2, 12.6), _polygon(5, 11.5, 0, 5.6, 12.8)],
        "heart": [_heart(21), _heart(19), _heart(17)],
        "rectangle": [_rectangle(22, 13), _rectangle(20, 14)],
        "oval": [_ellipse(11, 7), _ellipse(8, 11)],
        "diamond": [_polygon(4, 11, 0), "M12 1L20 12L12 23L4 12Z"],
        "pentagon": [_polygon(5, 11, 0, middle=12.6)],
        "hexagon": [_polygon(6, 11, math.pi / 6), _polygon(6, 11, 0)],
        "octagon": [_polygon(8, 11, math.pi / 8)],
        "crescent": ["M17 20A9.5 9.5 0 1 1 17 4A8 8 0 1 0 17 20Z"],
        "cross": ["M9 2H15V9H22V15H15V22H9V15H2V9H9Z"],
    }


def _row(phrase: str, number: int, style: str, body: str) -> dict[str, Any]:
    return {
        "id": f"{SET}:{phrase}-{style}-{number}",
        "set": SET,
        "style": style,
        "licence": ATTRIBUTION["licence"],
        "name": phrase,
        "phrase": phrase,
        "keywords": [],
        "group": "shapes",
        "palette": False,
        "concept": phrase,
        "hex": "",
        "tone": 0,
        "junk": "",
        "lex": "noun.shape",
        "colors": [],
        "recolour": True,
        "split": "train",
        "svg": f"{_HEAD}{body}</svg>",
        "img": None,
    }


def shape_rows() -> list[dict[str, Any]]:
    """One-colour rows of plain shapes: each filled twice, with sharp and with round corners, and once as an outline."""
    rows = []
    for phrase, paths in _paths().items():
        for i, path in enumerate(paths):
            fill = f'<path fill="currentColor" d="{path}"/>'
            edge = f'stroke="currentColor" stroke-linejoin="round" d="{path}"/>'
            joined = f'<path fill="currentColor" stroke-width="1.6" {edge}'
            line = f'<path fill="none" stroke-width="1.8" {edge}'
            rows.append(_row(phrase, 2 * i, "solid", fill))
            rows.append(
                _row(phrase, 2 * i + 1, "solid", joined.replace('d="', 'transform="translate(1.2 1.2) scale(.9)" d="'))
            )
            rows.append(_row(phrase, i, "outline", line.replace('d="', 'transform="translate(1.2 1.2) scale(.9)" d="')))
    return rows
