"""Metrics in Prometheus's text format. Labels are few and fixed: never a prompt, a key or an address."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter

__all__ = ["Metrics"]

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
HELP = {
    "onestill_http_requests_total": "Answered HTTP requests.",
    "onestill_http_request_seconds": "From the first byte of a request to the first of its answer.",
    "onestill_live_answers_total": "Answers on live connections.",
    "onestill_loop_lag_seconds": "How late the event loop wakes.",
    "onestill_pictures_total": "Pictures sent, by the route that asked.",
    "onestill_stage_seconds": "Time of each stage of a picture; a call's stages count once for each of its pictures.",
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and histograms. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[tuple[str, Labels]] = Counter()
        self._histograms: dict[tuple[str, Labels], list[float]] = {}  # a count for each bucket, then the sum
        self._started = time.time()

    def count(self, name: str, by: int = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[name, tuple(sorted(labels.items()))] += by

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add to a histogram."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            cells = self._histograms.setdefault(key, [0.0] * (len(BUCKETS_S) + 2))
            cells[bisect_left(BUCKETS_S, seconds)] += 1
            cells[-1] += seconds

    def render(self, gauges: dict[str, tuple[str, float]], events: Counter[str]) -> str:
        """All metrics as text.

        Args:
            gauges: current values: name -> (help, value).
            events: the counts of the scheduler.
        """
        with self._lock:
            counters = dict(self._counters)
            histograms = {key: list(cells) for key, cells in self._histograms.items()}
        counters |= {("onestill_scheduler_total", (("event", name),)): n for name, n in sorted(events.items())}
        lines = []
        for name in sorted({name for name, _ in counters}):
            lines += [f"# HELP {name} {HELP.get(name, 'Events of the scheduler.')}", f"# TYPE {name} counter"]
            lines += [f"{name}{_text(labels)} {n}" for (own, labels), n in sorted(counters.items()) if own == name]
        for name in sorted({name for name, _ in histograms}):
            lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} histogram"]
            for (own, labels), cells in sorted(histograms.items()):
                if own == name:
                    lines += _histogram(name, labels, cells)
        gauges = gauges | {"onestill_start_time_seconds": ("When the server started.", self._started)}
        for name, (text, value) in sorted(gauges.items()):
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name} {_number(value)}"]
        return "\n".join(lines) + "\n"


def _histogram(name: str, labels: Labels, cells: list[float]) -> list[str]:
    lines, total = [], 0
    for bound, n in zip((*(f"{bucket:g}" for bucket in BUCKETS_S), "+Inf"), cells, strict=False):
        total += int(n)
        lines.append(f"{name}_bucket{_text((*labels, ('le', bound)))} {total}")
    return [*lines, f"{name}_sum{_text(labels)} {_number(cells[-1])}", f"{name}_count{_text(labels)} {total}"]


def _number(value: float) -> str:
    """A number with all its digits; one without a fraction is written as an integer."""
    return str(int(value)) if value.is_integer() else repr(value)


def _text(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = ((name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
