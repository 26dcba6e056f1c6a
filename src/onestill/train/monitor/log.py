"""What a run leaves to be read: metrics.jsonl, TensorBoard events, sample sheets, a line on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from onestill.checkpoint import written_whole
from onestill.pipeline.sheet import sheet
from onestill.train.monitor.diagnostics import Watch
from onestill.train.runtime.parallel import gathered, is_main
from onestill.train.state import TrainState


class Log:
    """The diary of one run in `folder`. Values given to `step` are averaged over the steps until `write`.

    A run that resumes writes the rows that the uninterrupted run would have written, if its checkpoint stands at a row.
    """

    def __init__(self, folder: Path, name: str, state: TrainState, iterations: int) -> None:
        self._folder, self._name, self._iterations = folder, name, iterations
        self._path = folder / "metrics.jsonl"
        self._started = time.monotonic()
        self._first_nimg = self._last_nimg = state.nimg
        self._file: IO[str] | None = None
        if is_main():
            _forget_after(self._path, state.iteration)
            self._file = self._path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(folder / "events"), purge_step=state.iteration)
        self._watch = Watch()
        self._clear()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
            self._events.close()
        except OSError:  # where the disk is full, what failed before says more
            if kind is None:
                raise
        if sys.stderr.isatty():
            sys.stderr.write("\n")

    def step(self, state: TrainState, metrics: Mapping[str, Tensor], seconds: float, waited_s: float) -> None:
        """Take one iteration's metrics (scalars), how long it took, and how much of that it waited for data."""
        for key, value in metrics.items():
            self._values[key].append(value.detach())
        self._seconds += seconds
        self._waited_s += waited_s

    def write(self, state: TrainState) -> None:
        """Append the means since the last call to metrics.jsonl and TensorBoard, and show them.

        Over all processes: each of them calls this, and the main one writes.
        """
        started = time.perf_counter()
        means = _over_processes({key: _mean(values) for key, values in self._values.items()})
        self._seconds += time.perf_counter() - started  # in which a GPU does what it has been given
        if self._file is None:
            self._clear()
            return
        speed = (state.nimg - self._last_nimg) / max(self._seconds, 1e-9)
        row: dict[str, Any] = {"iteration": state.iteration, "nimg": state.nimg}
        row |= _for_json(means)
        for key, value in {**means, "images_per_s": speed}.items():
            self._events.add_scalar(key, value, state.iteration)
        row |= {"images_per_s": round(speed, 2), "data_wait": round(self._waited_s / max(self._seconds, 1e-9), 4)}
        row |= {"bad_steps": state.bad_steps}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._show(state, means, speed)
        self._warn(state, row)
        self._last_nimg = state.nimg
        self._clear()

    def sheet(
        self,
        state: TrainState,
        pictures: NDArray[np.uint8],
        captions: list[str],
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        """Save a contact sheet of `pictures` [N, H, W, 3] with their captions as sheets/ITERATION.png.

        `numbers` go into sheets/ITERATION.json beside it, and to TensorBoard.
        """
        if self._file is None:
            return
        folder = self._folder / "sheets"
        with written_whole(folder / f"{state.iteration:08d}.png") as unfinished:
            sheet(pictures, captions).save(unfinished, "PNG")
        if numbers:
            with written_whole(folder / f"{state.iteration:08d}.json") as unfinished:
                unfinished.write_text(json.dumps(_for_json(numbers)) + "\n", encoding="utf-8")
            for key, value in numbers.items():
                self._events.add_scalar(key, value, state.iteration)
            self._warn(state, numbers)

    def _warn(self, state: TrainState, numbers: Mapping[str, Any]) -> None:
        """Say what is going wrong, on the terminal and in warnings.txt."""
        for warning in self._watch.look(numbers):
            line = f"{self._name} {state.iteration}: {warning}"
            sys.stderr.write(f"\n{line}\n")
            with (self._folder / "warnings.txt").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _clear(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._seconds = 0.0
        self._waited_s = 0.0

    def _show(self, state: TrainState, means: Mapping[str, float], speed: float) -> None:
        left_s = (self._iterations - state.iteration) * (time.monotonic() - self._started)
        left_s /= max(1, (state.nimg - self._first_nimg) / max(1, state.nimg / max(1, state.iteration)))
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in means.items() if "/" not in key)
        line = f"{self._name} {state.iteration}/{self._iterations}  {numbers}  {speed:.1f} img/s  "
        line += f"{left_s / 60:.1f} min left"
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[2K" + line[: os.get_terminal_size(sys.stderr.fileno()).columns - 1])
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _over_processes(means: dict[str, float]) -> dict[str, float]:
    """The processes' means of those that are finite."""
    every = gathered(means)
    if len(every) == 1:
        return means
    finite = {key: [one[key] for one in every if math.isfinite(one.get(key, math.nan))] for key in means}
    return {key: sum(values) / len(values) if values else math.nan for key, values in finite.items()}


def _for_json(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {key: number if math.isfinite(number) else None for key, number in numbers.items()}


def _mean(values: list[Tensor]) -> float:
    """The mean of the finite ones, NaN if there are none: a skipped step does not hide the others."""
    there = torch.stack([value.float().to(values[0].device) for value in values]).cpu().unbind()  # asked for once
    numbers = [value for value in there if math.isfinite(value)]
    return float(sum(numbers) / len(numbers)) if numbers else math.nan


def _forget_after(path: Path, iteration: int) -> None:
    """Drop rows that a killed run wrote after the checkpoint it resumes from."""
    if not path.exists():
        return
    rows = [row for row in path.read_text(encoding="utf-8").splitlines() if _iteration_of(row) <= iteration]
    with written_whole(path) as unfinished:
        unfinished.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def _iteration_of(row: str) -> float:
    try:
        return float(json.loads(row)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by the kill
