"""Runs the steps of a timetable, one after the other, each in its own `try` and with its own limit.

A step that fails leaves its traceback; one that overruns is stopped; one that cannot be stopped ends the process, which
whoever supervises it starts again at the next step.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quarter.limits import OverranError, TimeIsUp, limited
from benchmarks.quarter.record import Record, since, stacks

__all__ = ["BROKEN", "STUCK", "LeftOutError", "Run", "Step", "run_steps"]

STUCK, BROKEN = 75, 76  # what the process ends with, for whoever supervises it
GRACE_S = 20.0  # that a step may overrun before the process is ended


class LeftOutError(Exception):
    """Raised by a step that has nothing to do, with the reason."""


@dataclass
class Run:
    """What all steps share.

    Attributes:
        options: the command line's.
        record: what is brought back of it.
        out: the folder that is brought back.
        work: the folder that stays, until the machine goes.
        started: when the command was given, of `time.time()`.
        device: "cuda" or "cpu".
        shared: what a step leaves for later ones, in this process.
    """

    options: Any
    record: Record
    out: Path
    work: Path
    started: float
    device: str
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether this is for real."""
        return self.device.startswith("cuda")

    @property
    def rehearses(self) -> bool:
        """Whether it is a rehearsal: tiny models, seconds for minutes."""
        return bool(self.options.rehearse)


@dataclass(frozen=True)
class Step:
    """One line of a timetable.

    Attributes:
        name: in the record.
        do: what is done, given the run, the seconds there are and a function that writes down facts at once.
        ends_s: when it must be over, in seconds after the start of the command.
        needs_s: the least that it needs; with less it is left out.
    """

    name: str
    do: Callable[[Run, float, Callable[..., None]], Mapping[str, Any] | None]
    ends_s: float
    needs_s: float = 0.0


def run_steps(run: Run, steps: Sequence[Step]) -> None:
    """Run them all. Whatever happens in one is written down, and the next begins."""
    for step in steps:
        run_step(run, step)
        gc.collect()
        if run.on_gpu and (why := broken_gpu()):
            run.record.put(step.name, gpu_after=why)
            os._exit(BROKEN)  # a GPU that met an illegal address serves this process no more, but it does the next


def run_step(run: Run, step: Step) -> None:
    """Run one step and write down what became of it."""
    began = time.monotonic()
    left_s = step.ends_s - since(run.started)

    def note(**facts: Any) -> None:
        run.record.put(step.name, **facts)

    if limit_s := run.options.limit.get(step.name):
        left_s = min(left_s, limit_s)
    if 0 < step.needs_s > left_s:
        note(state="left out", why=f"{max(left_s, 0):.0f} s are left, and it needs {step.needs_s:.0f}.")
        return
    if left_s <= 0:
        note(state="overran", began_s=since(run.started), limit_s=0, traceback="Its time was up before it began.")
        return
    note(state="running", began_s=since(run.started), limit_s=round(left_s, 1))
    outcome: dict[str, Any] = {}
    watching = threading.Event()
    grace = GRACE_S if run.on_gpu else max(GRACE_S, left_s)
    threading.Thread(target=_watch, args=(run, step.name, left_s + grace, watching), daemon=True).start()
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught, limited(left_s, f"the step '{step.name}'"):
            warnings.simplefilter("default")
            outcome = {**(step.do(run, left_s, note) or {}), "state": "done"}
    except LeftOutError as why:
        outcome = {"state": "left out", "why": str(why)}
    except (OverranError, TimeIsUp):
        outcome = {"state": "overran", "traceback": traceback.format_exc()}
    except (Exception, KeyboardInterrupt):
        outcome = {"state": "failed", "traceback": traceback.format_exc()}
    finally:
        watching.set()
    said = sorted({f"{one.category.__name__}: {one.message}" for one in caught})
    note(**outcome, took_s=round(time.monotonic() - began, 2), **({"warnings": said} if said else {}))
    print(f"{step.name}: {outcome['state']} after {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    if "traceback" in outcome:
        print(outcome["traceback"], file=sys.stderr, flush=True)


def _watch(run: Run, name: str, seconds: float, done: threading.Event) -> None:
    """End the process where a step cannot be stopped, once everything is written."""
    if done.wait(seconds):
        return
    run.record.put(name, state="stuck", traceback=stacks())
    os._exit(STUCK)


def broken_gpu() -> str | None:
    """What the GPU says where it computes nothing any more for this process."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").add_(1).item()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return str(error)
    return None
