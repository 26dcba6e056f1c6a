"""Starts the process that does the steps, and again where it is ended: by the watchdog, by the system, by a broken GPU.

It imports nothing heavy, draws the icons' pictures beside it, keeps its output as a log, and ends everything in time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from benchmarks.quarter.drawing import Drawing, is_owned, shards_in
from benchmarks.quarter.record import Record, since
from benchmarks.quarter.timetable import SLOW, has_icons, lasts_s
from onestill.errors import OutputError

__all__ = ["draw", "supervise"]

MOST_LOG = 2**20  # bytes
MOST_STARTS = 12


def supervise(options: Any, command: list[str]) -> int:
    """Run a whole command. Returns 0 where every step that began was done.

    Args:
        options: the command line's.
        command: what does the steps that the record does not have yet. The start of the whole is added as `--started`.
    """
    started = time.time()
    out, work = Path(options.out), Path(options.work)
    out.mkdir(parents=True, exist_ok=True)
    own_folder(work)
    is_drawn = is_owned(work)  # by a command of its own, before this one
    _begin(options, out, work, is_drawn)
    draws = has_icons(options) and options.parquet and not options.second and not is_drawn
    drawing = Drawing(work, options) if draws else None
    most_s = lasts_s(options) * (SLOW if options.rehearse else 1.0)
    log = Log(out / "log.txt")
    try:
        for _ in range(MOST_STARTS):
            status = _work([*command, "--started", repr(started)], log, started + most_s, drawing)
            record = Record.read(out, work) or Record(out, work, {})
            unfinished = [name for name, step in record.steps.items() if step.get("state") == "running"]
            for name in unfinished:
                record.put(name, state="died", traceback=f"The process ended with status {status} in this step.")
            if status == 0 or since(started) >= most_s or not record.steps:
                break
    finally:
        if drawing is not None:
            drawing.end()
            (work / "drawing.owner").unlink(missing_ok=True)
    record.value |= {"took_s": since(started), "failed": record.failed()}
    record.write()
    return 1 if record.failed() or status != 0 else 0


def draw(options: Any) -> int:
    """Draw pictures until all are drawn, or another command asks for their end. Returns 0 where there are some."""
    work = Path(options.work)
    own_folder(work)
    drawing = Drawing(work, options)
    try:
        while drawing.look():
            time.sleep(0.1)
    finally:
        drawing.end()
    return 0 if shards_in(work / "shards" / "train") else 1


def own_folder(work: Path) -> None:
    """Make the folder that stays, and mark it as ours: what lies in it is deleted by the next run.

    Raises:
        OutputError: there is something in it, and it is not ours.
    """
    mark = work / ".onestill-quarter"
    if work.is_dir() and any(work.iterdir()) and not mark.exists():
        raise OutputError(f"'{work}' holds something else, and a run deletes what it finds; give --work a new folder.")
    work.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _begin(options: Any, out: Path, work: Path, is_drawn: bool) -> None:
    """Make room for this command's record; the first one's stays readable for the second."""
    record = work / "quarter.json"
    if options.second:
        if record.is_file():
            record.replace(work / "first.json")
        return
    before = ("cached", "teacher", "student", *(() if is_drawn else ("shards",)))
    for name in before:  # of an earlier run, which would be gone on with
        shutil.rmtree(work / name, ignore_errors=True)
    for path in (record, work / "first.json", out / "quarter.json"):
        path.unlink(missing_ok=True)


def earlier(work: Path) -> dict[str, Any] | None:
    """The steps of the first command, for the second."""
    with suppress(OSError, ValueError, KeyError):
        steps: dict[str, Any] = json.loads((work / "first.json").read_text(encoding="utf-8"))["steps"]
        return steps
    return None


def _work(command: list[str], log: Log, ends: float, drawing: Drawing | None) -> int:
    """Start the process and wait for it, until `ends` of `time.time()`. Returns its status."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    assert child.stdout is not None
    reading = threading.Thread(target=log.take, args=(child.stdout,), daemon=True)
    reading.start()
    try:
        while child.poll() is None:
            if time.time() > ends:
                log.say("the time of the whole command is up")
                break
            if drawing is not None:
                drawing.look()
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):  # and what it left running: it has a session of its own
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        reading.join(5)
        if not reading.is_alive():
            child.stdout.close()
    return child.returncode


class Log:
    """What the process says: passed on, and stored up to a size."""

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, MOST_LOG
        path.write_bytes(b"")

    def take(self, stream: IO[bytes]) -> None:
        """Read a stream to its end."""
        for line in stream:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
            self._keep(line)

    def say(self, line: str) -> None:
        """Add a line of our own."""
        print(line, flush=True)
        self._keep(f"{line}\n".encode())

    def _keep(self, line: bytes) -> None:
        if self._left > 0:
            with self._path.open("ab") as file:
                file.write(line[: self._left])
            self._left -= len(line)
