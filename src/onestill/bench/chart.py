"""Where the milliseconds go, as an SVG of stacked bars, one for each contender and batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

PARTS = {
    "encode_ms": ("text encoder", "#7a9cc6"),
    "denoise_ms": ("steps", "#e08e45"),
    "decode_ms": ("decoder", "#6bab7d"),
}
LEFT, WIDTH, ROW, TOP = 220, 480, 34, 40  # px


def bars(results: Sequence[Mapping[str, Any]]) -> str:
    """The chart.

    Args:
        results: what `onestill.bench.latency.measure` returned, at least one.
    """
    longest = max(sum(one[part]["p50"] for part in PARTS) for one in results)
    rows = []
    for i, one in enumerate(results):
        y = TOP + ROW * i
        name = f"{one['contender']}, {one['dtype']}, batch {one['batch']}"
        rows.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        x = float(LEFT)
        for part, (_, colour) in PARTS.items():
            width = WIDTH * one[part]["p50"] / longest
            rows.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" fill="{colour}"/>')
            x += width
        rows.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{one["total_ms"]["p50"]:.1f} ms</text>')
    for i, (name, colour) in enumerate(PARTS.values()):
        x = LEFT + 130 * i
        rows.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
        rows.append(f'<text x="{x + 18}" y="22">{name}</text>')
    height = TOP + ROW * len(results) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 100}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img"><title>Prompt to pixels, medians</title>'
        f"{''.join(rows)}</svg>\n"
    )
