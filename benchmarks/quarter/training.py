"""Trains a recipe for so many seconds, by `onestill.train`'s own loop.

A first leg finds the rate; the second one's length is set by it, so that a learning rate that falls with the iterations
has fallen when the time is up. Where it is up sooner, the loop is interrupted as by Ctrl-C, which saves, and what was
reached is exported. Meanwhile the last checkpoint's averaged weights are brought back, every minute.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import load_file

from benchmarks.quarter.limits import OverranError
from benchmarks.quarter.pieces import PIECE_BYTES, pieces_of, write_pieces
from benchmarks.quarter.record import MOST_FILES, MOST_TOTAL, brought_back
from benchmarks.quarter.steps import Run
from onestill.data.recipe_reader import RecipeReader
from onestill.networks.denoiser import unet_folder
from onestill.train.recipe import DataOptions, Recipe, read_recipe
from onestill.train.run import train_recipe
from onestill.train.state import STATE_FILE, checkpoints
from onestill.train.unet import build_unet

__all__ = ["Training", "train_for"]

EVERY_S = 60.0  # weights are brought back
NEVER = 10**9  # iterations
ROLES = ("teacher", "student")
ROOM = 3 * 2**20  # bytes that the record, the log and the sheets may take of what is brought back
MOST_PIECES = MOST_FILES - 3


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        name: one of `ROLES`, whose averaged weights are brought back.
        recipe: a TOML file.
        overrides: `KEY=VALUE`, as `onestill train --set` takes them.
        out: the run's folder.
    """

    name: str
    recipe: Path
    overrides: Sequence[str]
    out: Path

    def read(self, *more: str) -> Recipe:
        """The recipe with its overrides."""
        return read_recipe(self.recipe, [*self.overrides, f"out={self.out}", *more])

    @property
    def iteration(self) -> int:
        """How far it has come."""
        found = checkpoints(self.out / "checkpoints")
        return int(json.loads((found[-1] / STATE_FILE).read_text(encoding="utf-8"))["iteration"]) if found else 0

    @property
    def export(self) -> Path:
        """Where the network lies when a leg is over."""
        return self.out / "export" / "unet"


def train_for(run: Run, training: Training, seconds: float, note: Callable[..., None]) -> Mapping[str, Any]:
    """Train so long, going on where the run's folder holds a checkpoint, and leave an export.

    Args:
        run: the run.
        training: what is trained.
        seconds: all that it may take, export included.
        note: writes down facts at once.

    Returns:
        What is to be known of it: iterations, images a second, the last rows of the log.
    """
    ends = time.monotonic() + seconds
    reserve_s = min(15.0, 0.15 * seconds)  # for the last checkpoint, the sheet and the export
    first_s = min(20.0, 0.15 * seconds)
    began = training.iteration
    often = ["loop.log_every=5", f"loop.sheet_every={NEVER}", f"loop.checkpoint_every={NEVER}"]
    setup_s = leg(run, training, [*often, f"loop.iterations={NEVER}"], Until(ends - reserve_s, first_s), note)
    rate = iterations_per_s(training)
    more = int(0.93 * rate * (ends - time.monotonic() - reserve_s - setup_s))
    note(iterations_per_s=round(rate, 3), first_leg_ended_at=training.iteration, setup_s=round(setup_s, 1))
    if more > 0:
        settings = [f"loop.iterations={training.iteration + more}", f"loop.sheet_every={NEVER}"]
        settings.append(f"loop.checkpoint_every={max(1, int(rate * EVERY_S))}")
        leg(run, training, settings, Until(ends - reserve_s), note)
    if training.iteration == 0:
        raise OverranError("The time was up before the first iteration was saved; give the step more of it.")
    if not is_exported(training):
        leg(run, training, [f"loop.iterations={training.iteration}"], Until(float("inf")), note)
    bring_back(run, training, note)
    return facts(run, training, began)


@dataclass(frozen=True)
class Until:
    """When a leg is interrupted: at `ends`, of `time.monotonic()`, or `after_s` seconds after its first rows."""

    ends: float
    after_s: float = float("inf")


def leg(run: Run, training: Training, settings: Sequence[str], until: Until, note: Callable[..., None]) -> float:
    """Train from the last checkpoint on, until the recipe is at its end or the time is up, which saves.

    Returns:
        The seconds until its first row was written, which it takes to begin.
    """
    readers: list[RecipeReader] = []

    def reader(options: DataOptions, part: tuple[int, int]) -> RecipeReader:
        readers.append(RecipeReader(options, part))
        return readers[-1]

    overrides = [*training.overrides, f"out={training.out}", *settings]
    minder = Minder(run, training, until, note)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    minder.start()
    try:
        train_recipe(training.recipe, overrides, reader=reader, resume=True)
    except KeyboardInterrupt:
        if not minder.asked:
            raise  # by a person
    finally:
        minder.stop()
        for one in readers:
            one.shards.close()
    return minder.setup_s


class Minder(threading.Thread):
    """Looks after a leg: brings weights back every minute, and interrupts it when its time is up."""

    def __init__(self, run: Run, training: Training, until: Until, note: Callable[..., None]) -> None:
        super().__init__(daemon=True, name="minder")
        self.asked, self.setup_s = False, 0.0
        self._run, self._training, self._until, self._note = run, training, until, note
        self._stopped = threading.Event()
        self._back_at = 0

    def run(self) -> None:
        began, began_s = iterations_logged(self._training), time.monotonic()
        ends, next_s = self._until.ends, time.monotonic() + EVERY_S
        while not self._stopped.wait(0.1):
            if not self.setup_s and iterations_logged(self._training) > began:
                self.setup_s = time.monotonic() - began_s
                ends = min(ends, time.monotonic() + self._until.after_s)
            if time.monotonic() >= ends and not self.asked:
                self.asked = True
                os.kill(os.getpid(), signal.SIGINT)  # which the loop takes for Ctrl-C: it saves and stops
            if time.monotonic() >= next_s and self._training.iteration > self._back_at:
                next_s = time.monotonic() + EVERY_S
                self._back_at = self._training.iteration
                bring_back(self._run, self._training, self._note)

    def stop(self) -> None:
        """Nothing is interrupted any more."""
        self._stopped.set()
        self.join()


def bring_back(run: Run, training: Training, note: Callable[..., None]) -> None:
    """The last checkpoint's averaged weights and the last sheet, as far as there is room."""
    try:
        found = checkpoints(training.out / "checkpoints")
        if not found:
            return
        weights = load_file(found[-1] / f"{training.name}.ema.safetensors")
        size = sum(2 * one.numel() for one in weights.values())
        if size + ROOM > MOST_TOTAL:
            note(brought_back=f"nothing, as {size / 2**20:.0f} MiB are too much")
            return
        before = [path for other in ROLES if other != training.name for path in pieces_of(run.out, other)]
        pieces = -(-size // PIECE_BYTES) + 1
        if size + ROOM + sum(map(file_size, before)) > MOST_TOTAL or pieces + len(before) > MOST_PIECES:
            for path in before:  # what came before it is worth less
                path.unlink()
        write_pieces(weights, run.out, training.name, config_of(training), training.iteration)
        note(brought_back={"iteration": training.iteration, "mib": round(size / 2**20, 1)})
        bring_sheets(run)
    except Exception:
        note(not_brought_back=traceback.format_exc())


def file_size(path: Path) -> int:
    """Bytes."""
    return path.stat().st_size


def bring_sheets(run: Run) -> None:
    """The last sheet of each training, one below the other in one file."""
    sheets = [sorted((run.work / role / "sheets").glob("*.png"))[-1:] for role in ROLES]
    pictures = [PIL.Image.open(path).convert("RGB") for found in sheets for path in found]
    if not pictures:
        return
    whole = PIL.Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), "white")
    top = 0
    for one in pictures:
        whole.paste(one, (0, top))
        top += one.height
    whole.save(run.work / "sheets.jpg", quality=88)
    brought_back(run.work / "sheets.jpg", run.out)


def config_of(training: Training) -> dict[str, Any]:
    """The config of the network that is trained: its export's, else what the recipe says that it will be."""
    config = training.export / "config.json"
    recipe = training.read()
    if not config.is_file() and recipe.method == "diffusion" and not recipe.options.start:
        with torch.device("meta"):
            return dict(build_unet(recipe.options.unet).config)
    source = recipe.options.start if recipe.method == "diffusion" else recipe.options.teacher
    found: dict[str, Any] = json.loads(
        (config if config.is_file() else unet_folder(source) / "config.json").read_text(encoding="utf-8")
    )
    return found


def is_exported(training: Training) -> bool:
    """Whether there is an export, and no checkpoint that is younger."""
    export, found = training.export / "config.json", checkpoints(training.out / "checkpoints")
    return export.is_file() and (found[-1] / STATE_FILE).stat().st_mtime <= export.stat().st_mtime


def rows(training: Training) -> list[dict[str, Any]]:
    """The rows of the run's log."""
    with suppress(OSError):
        lines = (training.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    return []


def iterations_logged(training: Training) -> int:
    """The last row's."""
    found = rows(training)
    return int(found[-1]["iteration"]) if found else 0


def iterations_per_s(training: Training) -> float:
    """By the last row of the log, in which the start has no part; 0 where there is none."""
    found = rows(training)
    return float(found[-1]["images_per_s"]) / training.read().loop.batch_size if found else 0.0


def facts(run: Run, training: Training, began: int) -> dict[str, Any]:
    """What is to be known when it is over."""
    found = rows(training)
    batch_size = training.read().loop.batch_size
    done = training.iteration - began
    memory = round(torch.cuda.max_memory_allocated() / 1e9, 2) if run.on_gpu else None
    return {
        "iterations": training.iteration,
        "iterations_now": done,
        "images": done * batch_size,
        "batch_size": batch_size,
        "peak_memory_gb": memory,
        "rows": found[-20:],
    }
