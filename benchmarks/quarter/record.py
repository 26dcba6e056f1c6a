"""What a run leaves: one JSON file, written whole after every change, and never more than may be brought back.

The machine may go at any moment, so nothing waits for the end. A copy lies in the work folder, for the second command:
the first one's output may have been taken away by then.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onestill.checkpoint import written_whole

__all__ = ["MOST_BYTES", "MOST_FILES", "MOST_TOTAL", "Record", "outbox", "stacks"]

MOST_FILES = 8  # that come back from a lent machine
MOST_BYTES = 16 * 2**20  # of one of them
MOST_TOTAL = 64 * 2**20
NAME = "quarter.json"
MOST_TEXT = 20_000  # characters of one text in the record: tracebacks of compilers are books
FAILED = ("failed", "overran", "stuck", "died")


class Record:
    """The steps of a run, and what became of each.

    A step is a dict: `state` ("running", "done", "left out", or one of `FAILED`), `began_s` after the start of the
    command, `limit_s`, `took_s`, `traceback` where there is one, and what the step itself says.

    Args:
        out: the folder that is brought back.
        work: the folder that stays.
        facts: what to say of the run as a whole.
    """

    def __init__(self, out: Path, work: Path, facts: Mapping[str, Any]) -> None:
        self._places = (out / NAME, work / NAME)
        self._lock = threading.RLock()  # the watchdog writes too
        self.value: dict[str, Any] = {**facts, "steps": {}}

    @classmethod
    def read(cls, out: Path, work: Path) -> Record | None:
        """The record of the run so far, None where there is none."""
        try:
            value = json.loads((work / NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        found = cls(out, work, {})
        found.value = value
        return found

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """Step -> what became of it, in the order in which they began."""
        steps: dict[str, dict[str, Any]] = self.value["steps"]
        return steps

    def failed(self) -> list[str]:
        """The steps that failed, in order."""
        return [name for name, step in self.steps.items() if step["state"] in FAILED]

    def put(self, name: str, **facts: Any) -> None:
        """Add to what is said of a step, and write it down."""
        with self._lock:
            self.steps.setdefault(name, {}).update(facts)
            self.write()

    def write(self) -> None:
        """Write everything, here and in the work folder."""
        with self._lock:
            text = json.dumps(plain(self.value), indent=1) + "\n"
            for place in self._places:
                with contextlib.suppress(OSError), written_whole(place) as unfinished:
                    unfinished.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """The same as what JSON holds: no NaN, no endless text, nothing but lists, dicts, numbers and text."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    text = str(value)
    half = MOST_TEXT // 2
    return text if len(text) <= MOST_TEXT else f"{text[:half]}\n[{len(text) - MOST_TEXT} more]\n{text[-half:]}"


def stacks() -> str:
    """Where every thread of this process stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames)


def outbox(folder: Path) -> tuple[int, int]:
    """How many files lie in a folder and below, and how many bytes they are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return len(files), sum(path.stat().st_size for path in files)


def brought_back(source: Path, out: Path) -> bool:
    """Copy a file to the folder that is brought back, if there is room. Its namesake there is replaced."""
    target = out / source.name
    count, total = outbox(out)
    if target.is_file():
        count, total = count - 1, total - target.stat().st_size
    size = source.stat().st_size
    if count + 1 > MOST_FILES or size > MOST_BYTES or total + size > MOST_TOTAL:
        return False
    with written_whole(target) as unfinished:
        shutil.copyfile(source, unfinished)
    return True


def since(started: float) -> float:
    """Seconds since `started`, of `time.time()`: the clock that all processes of a run share."""
    return round(time.time() - started, 2)
