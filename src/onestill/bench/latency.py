"""How long a prompt takes to become a picture, part by part: ours and diffusers', on the same weights and seeds.

A contender measures in a process of its own, which `python -m onestill.bench.latency` is: in one process they would
share thread pools and memory. Every prompt is new to it, so that no cached state is used, but where `cached` says so.
Where a process of its own would cost more than it is worth, `measure` takes a contender that is loaded already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from onestill.bench.setting import CONTENDERS, PARTS, Loaded, Setting
from onestill.engine.device import peak_memory
from onestill.errors import OnestillError, require

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "pink", "brown")
THINGS = ("apple", "bicycle", "heart", "house", "star", "cat", "key", "cloud", "boat", "book", "bell", "tree")
STYLES = ("fluent 3d emoji", "flat emoji", "line icon", "filled icon", "pixel art")


class MeasuringError(OnestillError):
    """A contender was not measured. `stderr` is all that its process wrote there, its traceback among it."""

    def __init__(self, sentence: str, stderr: str = "") -> None:
        super().__init__(sentence)
        self.stderr = stderr


def prompts(count: int) -> list[str]:
    """As many prompts, all different."""
    whole = [f"a {colour} {thing}, {style}" for style, thing, colour in product(STYLES, THINGS, COLOURS)]
    return [f"{whole[i % len(whole)]} {i // len(whole) or ''}".strip() for i in range(count)]


def measure_elsewhere(setting: Setting, *, most_s: float | None = None) -> dict[str, Any]:
    """`measure` in a process of its own, which is ended after `most_s` seconds.

    Raises:
        MeasuringError: it failed, or took longer; the sentence is the process's own last line, `stderr` all of them.
    """
    command = [sys.executable, "-m", "onestill.bench.latency", json.dumps(asdict(setting))]
    try:
        done = subprocess.run(command, capture_output=True, timeout=most_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise MeasuringError(
            f"Measuring {setting.contender} took more than {most_s:.0f} s and was ended; allow it more time.",
            (error.stderr or b"").decode(errors="replace"),
        ) from None
    written = done.stderr.decode(errors="replace")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = written.strip().splitlines()
        last = said[-1] if said else f"its process ended with status {done.returncode}"
        raise MeasuringError(f"Measuring {setting.contender} failed: {last.rstrip('.')}.", written)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure(setting: Setting, *, loaded: Loaded | None = None, most_s: float | None = None) -> dict[str, Any]:
    """Load one contender in this process, let it warm up, and time every call.

    Args:
        setting: the contender, and what it is asked for.
        loaded: the contender, where it is loaded already; `load_ms` is then 0.
        most_s: after so many seconds, the warm-up's not among them, no further call is made. One always counts.

    Returns:
        What was asked for, of which `pictures` are the calls that were made; `load_ms`, `first_ms` (the first call),
        for each part its median and 95th percentile, `cached_ms` (the median of the repeats, None without),
        `images_per_second`, `peak_memory_mb`, and the contender's `facts`.

    Raises:
        OnestillError: there is no such contender, or it cannot be loaded.
    """
    if setting.contender not in CONTENDERS:
        raise OnestillError(f"There is no contender '{setting.contender}'; choose from {', '.join(CONTENDERS)}.")
    started = time.perf_counter()
    if loaded is None:
        from onestill.bench.contenders import load_contender

        loaded = load_contender(setting)
    load_ms = 1000 * (time.perf_counter() - started)
    _forget_peak_memory(loaded.facts["device"])
    new_prompts = prompts((setting.warm_up + setting.pictures) * setting.batch)
    times: list[Mapping[str, float]] = []
    ends = float("inf")
    for i in range(setting.warm_up + setting.pictures):
        if i == setting.warm_up and most_s is not None:
            ends = time.perf_counter() + most_s
        if i > setting.warm_up and time.perf_counter() > ends:
            break
        last = new_prompts[i * setting.batch : (i + 1) * setting.batch]
        times.append(loaded.draw(last, setting.seed + i * setting.batch))
    again = [
        loaded.draw(last, setting.seed + i)["total_ms"] for i in range(setting.repeats) if time.perf_counter() < ends
    ]
    counted = times[setting.warm_up :]
    total = percentile([one["total_ms"] for one in counted], 50)
    return {
        **asdict(setting),
        **loaded.facts,
        "pictures": len(counted),
        "load_ms": round(load_ms, 1),
        "first_ms": round(times[0]["total_ms"], 1),
        **{part: _summary([one[part] for one in counted]) for part in PARTS},
        "cached_ms": round(percentile(again, 50), 2) if again else None,
        "images_per_second": round(1000 * setting.batch / total, 3),
        "peak_memory_mb": round(_peak_memory(loaded.facts["device"]) / 1e6, 1),
    }


def psnr(first: Path, second: Path) -> float | None:
    """Decibels between two pictures; None where they are equal."""
    a, b = (np.asarray(PIL.Image.open(path), dtype=np.float64) for path in (first, second))
    error = float(((a - b) ** 2).mean())
    return None if error == 0 else round(float(10 * np.log10(255**2 / error)), 1)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed, the nearest one that was measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"p50": round(percentile(values, 50), 2), "p95": round(percentile(values, 95), 2)}


def _forget_peak_memory(device: str) -> None:
    """Of a GPU, where another contender may have been measured in this process. A process's own cannot be forgotten."""
    if device.startswith("cuda"):
        require("torch", "torch").cuda.reset_peak_memory_stats(device)


def _peak_memory(device: str) -> float:
    """Bytes: of the GPU where one computes, else of this process."""
    if (on_gpu := peak_memory(device)) is not None:
        return on_gpu
    if sys.platform == "win32":
        return float("nan")
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        print(json.dumps(measure(Setting(**json.loads(sys.argv[1])))))
    except OnestillError as failure:
        sys.exit(str(failure).rstrip("."))
