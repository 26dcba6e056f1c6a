"""The one training loop. A method brings networks, optimizers and a step; everything else happens here, once.

    for each iteration:  take a batch -> method.step -> averages -> sheet -> log -> checkpoint

Killed at any moment, `train(..., resume=True)` resumes from the last whole checkpoint to the same numbers, on the same
device with the same number of threads. Several processes (`parallel`) run this same loop side by side.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from onestill.checkpoint import written_whole
from onestill.engine.device import choose, explained, is_auto
from onestill.errors import OnestillError, RecipeError
from onestill.train.batches import to_device
from onestill.train.monitor.log import Log
from onestill.train.noise import generators
from onestill.train.optim.step import Batch, Objectives, Skipped, Update, decides_itself, optimize, rows_at_once
from onestill.train.recipe import LoopOptions, Recipe
from onestill.train.runtime import parallel
from onestill.train.runtime.compiling import next_iteration
from onestill.train.runtime.interrupt import Interrupt, Interrupted
from onestill.train.state import (
    TrainState,
    checkpoints,
    drop_checkpoint,
    load_checkpoint,
    save_checkpoint,
    start_ema,
    sweep,
)  # fmt: skip


class Batches(Protocol):
    """An endless, resumable source of batches."""

    def next(self) -> Batch: ...

    def state(self) -> dict[str, Any]:
        """JSON-able: where the next call of `next` stands."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


class Method(Protocol):
    """What a file in `methods/` provides.

    `networks` are trained; `averaged` names those with an EMA; `batch` names what the batches hold, a key of
    `batches.COLLATE`; `splits` says that the networks are called by their `forward` alone, as FSDP2 needs.
    `step` computes losses from one batch. It yields each loss, at most one an optimizer, with the name of the optimizer
    and what the log shows. What follows the `yield` sees the weights after that optimizer's step. All its noise comes
    from `state.draw`.
    `sheet` draws what a person looks at: uint8 [N, H, W, 3], N captions and, if it likes, numbers for the log.
    `export` writes the finished networks into a folder. Among several processes, all of them call all of these, and
    the main one writes.
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    averaged: tuple[str, ...]
    batch: str
    splits: bool

    def to(self, device: torch.device) -> None: ...

    def step(self, state: TrainState, batch: Batch) -> Objectives: ...

    def sheet(
        self, state: TrainState
    ) -> tuple[NDArray[np.uint8], list[str]] | tuple[NDArray[np.uint8], list[str], dict[str, float]]: ...

    def export(self, state: TrainState, folder: Path) -> None: ...


class TrainingStoppedError(OnestillError):
    """Training cannot go on: too many steps in a row gave NaN."""


def train(recipe: Recipe, method: Method, batches: Batches, *, resume: bool = False) -> TrainState:
    """Run `recipe` to its last iteration, or until a signal asks it to stop.

    Raises:
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; what was trained is saved.
        RecipeError: the run folder already holds another run and `resume` is false.
        TrainingStoppedError: `loop.max_bad_steps` steps in a row were not finite.
    """
    out, options = _run_folder(recipe, resume), recipe.loop
    device = _start(options)
    state = _initial_state(recipe, method, device)
    _resume(recipe, state, batches, resume)
    autocast, on_device = _autocast(device, options), _on_device(device, state, options)
    skipped = Skipped()
    saved = state.iteration  # what is resumed from is there already
    with Log(out, recipe.name, state, options.iterations) as log, Interrupt() as interrupt:
        while state.iteration < options.iterations and not interrupt.asked(state.iteration):
            # Take a batch.
            started = time.perf_counter()
            batch = to_device(batches.next(), device)
            waited_s = time.perf_counter() - started

            # Step every optimizer, then move the averages.
            next_iteration(options, device)
            update = Update(state, options, on_device=on_device)
            metrics = optimize(method.step, state, batch, update, autocast)
            state.iteration += 1
            state.nimg += options.batch_size
            state.data = batches.state()
            if update.bad is not True:  # a GPU that skipped a step moves its averages to where the weights still are
                state.update_ema(options.ema_decay)

            # Report, draw and save, each when it is due.
            skipped.add(update.bad)
            log.step(state, {**metrics, **update.norms}, time.perf_counter() - started, waited_s)
            last, in_a_row = state.iteration == options.iterations, 0
            logs, saves = (last or state.iteration % n == 0 for n in (options.log_every, options.checkpoint_every))
            if logs or saves or skipped.known:
                in_a_row = skipped.ask(state)
            if state.iteration % options.sheet_every == 0 or last:
                log.sheet(state, *method.sheet(state))
            if logs:
                log.write(state)
            if saves:
                _save(state, out / "checkpoints", recipe)
                saved = state.iteration
            if in_a_row >= options.max_bad_steps:
                raise TrainingStoppedError(
                    f"{in_a_row} steps in a row gave NaN or infinity: lower the learning rate, or look at the "
                    f"last sheet in {out}."
                )
        if interrupt.signum is not None and state.iteration < options.iterations:
            if saved != state.iteration:
                skipped.ask(state)
                _save(state, out / "checkpoints", recipe)
            raise Interrupted(interrupt.signum, state.iteration)
    _export(method, state, out / "export")
    return state


def _run_folder(recipe: Recipe, resume: bool) -> Path:
    """The run's folder, made where it is not there."""
    out = Path(recipe.out)
    if not resume and checkpoints(out / "checkpoints"):
        raise RecipeError(f"{out} already holds a run: give --resume to go on with it, or another 'out' folder.")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _autocast(device: torch.device, options: LoopOptions) -> Callable[[], AbstractContextManager[Any]]:
    # Without the cache of casts, which would hand a network's weights of before its step to the next loss.
    return partial(torch.autocast, device.type, torch.bfloat16, options.precision == "bf16", cache_enabled=False)


def _on_device(device: torch.device, state: TrainState, options: LoopOptions) -> bool:
    """Whether the device decides which steps are skipped: a GPU, with optimizers that can."""
    able = all(decides_itself(optimizer) for optimizer in state.optimizers.values())
    return device.type == "cuda" and options.parallel != "fsdp" and able


def _resume(recipe: Recipe, state: TrainState, batches: Batches, resume: bool) -> None:
    """Load the run's last checkpoint, where it is to be resumed, and write down its recipe."""
    out = Path(recipe.out)
    if parallel.is_main():
        sweep(out / "checkpoints")
    parallel.wait()
    if resume and (found := checkpoints(out / "checkpoints")):
        load_checkpoint(state, found[-1], recipe.fingerprint(), recipe.default_fingerprint())
        batches.load_state(state.data)
    if parallel.is_main():
        with written_whole(out / "recipe.json") as unfinished:
            unfinished.write_text(json.dumps(recipe.resolved(), indent=1) + "\n", encoding="utf-8")


def _export(method: Method, state: TrainState, folder: Path) -> None:
    """The method's export, in its place when it is whole: whoever finds it there may take it for finished."""
    unfinished = folder.with_name(f".{folder.name}")
    if parallel.is_main():
        shutil.rmtree(unfinished, ignore_errors=True)  # of a killed run
    method.export(state, unfinished)
    if parallel.is_main():
        drop_checkpoint(folder)
        unfinished.replace(folder)


def _start(options: LoopOptions) -> torch.device:
    """Meet the other processes; returns the device to train on, among several processes this one's own."""
    parallel.start(options.device)
    rows_at_once(options, parallel.world())
    if parallel.world() > 1:
        device = parallel.device()
    else:
        try:
            device = torch.device(choose(options.device))
        except OnestillError as error:
            raise RecipeError(f"loop.device '{options.device}' cannot be used: {error}") from error
    _allow_tf32(device)
    if is_auto(options.device) and parallel.is_main():
        print(f"loop.device is auto: {explained(str(device))}", file=sys.stderr)
    return device


def _allow_tf32(device: torch.device) -> None:
    """Let a GPU multiply float32 in TF32, of ten bits after the point, and measure which convolution is fastest."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def _initial_state(recipe: Recipe, method: Method, device: torch.device) -> TrainState:
    """The state at iteration 0, with networks on their device and shared among the processes."""
    if recipe.loop.parallel == "fsdp" and not method.splits:
        raise RecipeError(f"the method {recipe.method} does not split its networks: set loop.parallel to ddp.")
    method.to(device)
    if recipe.loop.parallel == "fsdp" and parallel.world() > 1:
        for network in method.networks.values():
            before = dict(network.named_parameters())
            parallel.shard(network, bf16=recipe.loop.precision == "bf16")
            parallel.repoint(method.optimizers.values(), before, network)
    generator, host = generators(device, recipe.loop.seed)
    ema = {role: start_ema(method.networks[role]) for role in method.averaged}
    return TrainState(method.networks, method.optimizers, ema, generator, host=host)


def _save(state: TrainState, folder: Path, recipe: Recipe) -> None:
    save_checkpoint(state, folder / f"{state.iteration:08d}", recipe.fingerprint())
    if not parallel.is_main():
        return
    for old in checkpoints(folder)[: -recipe.loop.keep_checkpoints]:
        drop_checkpoint(old)
