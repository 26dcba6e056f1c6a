"""The icons' pictures, drawn by processes of their own from the first second on, while the GPU is measured.

Whoever supervises the run owns them, or a command of its own that began before it (`--draw`). The step that needs the
pictures asks for their end through a file, as it runs in another process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from onestill.checkpoint import written_whole

__all__ = ["Drawing", "end_drawing", "is_owned", "shards_in"]

LEFT_FREE = 2  # cores that measuring has to itself
POLITE = 10  # how far drawing stands back for a core
MOST_LINES = 12  # of its output, in the record


class Drawing:
    """`recipes.icons.render` in the background; its shards appear whole, one after the other.

    Args:
        work: the folder that stays.
        options: `parquet`, `samples`, `pixels`, `samples_per_shard` and `text_encoder`: what is drawn.
    """

    def __init__(self, work: Path, options: Any) -> None:
        self._work, self._log = work, work / "drawing.log"
        self.processes = max(1, (os.cpu_count() or 1) - LEFT_FREE)
        command = [sys.executable, "-m", "recipes.icons.render", "--parquet", str(options.parquet)]
        command += ["--out", str(work / "shards"), "--splits", "train", "--samples", str(options.samples)]
        command += ["--size", str(options.pixels), "--samples-per-shard", str(options.samples_per_shard)]
        command += ["--text-encoder", str(options.text_encoder), "--processes", str(self.processes)]
        if nice := shutil.which("nice"):
            command = [nice, "-n", str(POLITE), *command]
        shutil.rmtree(work / "shards", ignore_errors=True)
        for name in ("drawing.end", "drawing.json"):  # of an earlier run
            (work / name).unlink(missing_ok=True)
        (work / "shards").mkdir(parents=True)  # by which others know that pictures are coming
        (work / "drawing.owner").write_text(str(os.getpid()), encoding="utf-8")
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # so that all its processes are ended with it, and nobody else's
            )
        self._is_over = False

    def look(self) -> bool:
        """End it if somebody asked, and write down what became of it once it is over. To be called now and then.

        Returns:
            Whether it still draws.
        """
        if self._is_over:
            return False
        if self._child.poll() is not None:
            self._over("done" if self._child.returncode == 0 else "failed")
        elif (self._work / "drawing.end").exists():
            self.end()
        return not self._is_over

    def end(self) -> None:
        """End it; whole shards stay."""
        if self._is_over:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, how)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(2)
        self._over("ended")

    def _over(self, state: str) -> None:
        self._is_over = True
        lines = self._log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        facts = {"state": state, "status": self._child.returncode, "processes": self.processes}
        with written_whole(self._work / "drawing.json") as unfinished:
            unfinished.write_text(json.dumps({**facts, "last_lines": lines[-MOST_LINES:]}), encoding="utf-8")


def is_owned(work: Path) -> bool:
    """Whether another command is drawing into this folder, or has drawn."""
    try:
        os.kill(int((work / "drawing.owner").read_text(encoding="utf-8")), 0)
    except (OSError, ValueError):
        return (work / "drawing.json").is_file() and bool(shards_in(work / "shards" / "train"))
    return True


def end_drawing(work: Path, wait_s: float) -> dict[str, Any]:
    """Wait so many seconds for the pictures, then ask for the end of drawing. Returns what became of it."""
    until = time.monotonic() + wait_s
    facts = work / "drawing.json"
    while not facts.exists() and time.monotonic() < until:
        time.sleep(0.1)
    (work / "drawing.end").touch()
    until = time.monotonic() + 10
    while not facts.exists() and time.monotonic() < until:
        time.sleep(0.1)
    found = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {"state": "nobody ended it"}
    return {**found, "shards": len(shards_in(work / "shards" / "train"))}


def shards_in(folder: Path) -> list[Path]:
    """The shards that are whole; unfinished ones have names that begin with a dot."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
