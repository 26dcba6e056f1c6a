"""What happens when, in seconds after the command was given. A step that is over sooner leaves its time to the next.

| until | first command |
|---|---|
| 0:40 | what the machine is; the icons' pictures are being drawn since 0:00 |
| 1:35 | correctness, on small models |
| 3:35 | SDXL's size |
| 4:20 | the icons' latents |
| 6:35 | the teacher |
| 9:15 | the student |

What time is left then goes to the compiled forms: all of the icons', where there is no autoencoder or nothing to draw.
The second command does again what failed first, and what waited for it; else the student goes on; else, or where time
is left, the compiled forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.quarter.record import FAILED
from benchmarks.quarter.steps import Run, Step

__all__ = ["ENDS_S", "FIRST_S", "SECOND_S", "plan"]

FIRST_S, SECOND_S = 570.0, 140.0  # the commands are ended then, whatever they do, unless --lasts says otherwise
ENDS_S = {"environment": 40, "correctness": 95, "speed": 215, "latents": 260, "teacher": 395, "student": 555}
ICONS = ("latents", "teacher", "student")
COMPILED_NEEDS_S = 60.0  # else it is not begun
SLOW = 20.0  # times as long a rehearsal may take: a CPU that others use is slow, and the models are small
MODULES = {"latents": "icons", "teacher": "icons", "student": "icons", "compiled": "speed"}


def plan(options: Any, earlier: Mapping[str, Any] | None = None) -> list[Step]:
    """The steps of a command.

    Args:
        options: the command line's.
        earlier: for the second command the steps of the first, each with its `state`; None if there are none.
    """
    if options.second:
        names, last = second(options, earlier or {}), lasts_s(options) - 10
        ends = {name: last * (i + 1) / len(names) for i, name in enumerate(names)}
    else:
        ends = {name: float(at) for name, at in ENDS_S.items() if name not in ICONS or has_icons(options)}
        last = lasts_s(options) - 15
    slow = SLOW if options.rehearse else 1.0
    steps = [Step(name, _later(name), slow * min(at, last)) for name, at in ends.items()]
    return [*steps, Step("compiled", _later("compiled"), slow * last, needs_s=COMPILED_NEEDS_S)]


def lasts_s(options: Any) -> float:
    """How long a command takes at most, in seconds; a rehearsal `SLOW` times as long."""
    return float(options.lasts or (SECOND_S if options.second else FIRST_S))


def has_icons(options: Any) -> bool:
    """Whether there is what the icons are trained from: an autoencoder, and pictures or what they are drawn from."""
    pictures = [options.parquet, options.shards, Path(options.work) / "shards"]
    there = any(one and Path(one).exists() for one in pictures)
    return bool(there and options.autoencoder and Path(options.autoencoder).is_dir())


def second(options: Any, earlier: Mapping[str, Any]) -> list[str]:
    """The names of the second command's steps, but for the last."""
    if options.again:
        return [name for name in ENDS_S if name in options.again]
    states = {name: step.get("state") for name, step in earlier.items()}
    again = [name for name, state in states.items() if state in FAILED]
    if has_icons(options) and set(again) & set(ICONS):
        again += [name for name in ICONS if name not in again and states.get(name) != "done"]
    known = [name for name in ENDS_S if name in again]
    return known or (["student"] if states.get("student") == "done" else [])


def _later(name: str) -> Callable[[Run, float, Callable[..., None]], Mapping[str, Any] | None]:
    """A step's function, imported when it begins: what cannot be imported fails that step alone."""

    def do(run: Run, seconds: float, note: Callable[..., None]) -> Mapping[str, Any] | None:
        module = import_module(f"benchmarks.quarter.{MODULES.get(name, name)}")
        found: Mapping[str, Any] | None = getattr(module, name)(run, seconds, note)
        return found

    return do
