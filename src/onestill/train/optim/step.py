"""One optimization step: for each loss that a method yields, backward, average over processes, clip, optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from onestill.errors import RecipeError
from onestill.train.noise import Part
from onestill.train.optim.muon import Muon, Together
from onestill.train.recipe import LoopOptions
from onestill.train.runtime import parallel
from onestill.train.state import TrainState

Batch = Mapping[str, Any]
Metrics = dict[str, Tensor]  # scalars for the log
# What a method's step yields, once for each optimizer: its name, the loss that it lowers, and what the log shows. What
# follows the `yield` sees the weights after that optimizer's step.
Objectives = Generator[tuple[str, Tensor, Metrics], None, None]
Step = Callable[[TrainState, Batch], Objectives]


def rows_at_once(options: LoopOptions, world: int) -> int:
    """How many samples a process takes in one pass.

    Raises:
        RecipeError: the batch cannot be divided so, or one sample would be left by itself.
    """
    parts = world * options.accumulate
    if options.batch_size % parts:
        raise RecipeError(
            f"loop.batch_size {options.batch_size} is not divisible by {world} process(es) times loop.accumulate "
            f"{options.accumulate}: make it a multiple of {parts}."
        )
    rows = options.batch_size // parts
    if rows < 2:
        raise RecipeError(
            f"{world} process(es) times loop.accumulate {options.accumulate} leave one sample of {options.batch_size} "
            "to each pass, on which a hinge on mean logits can settle at nothing learnt: give each at least two."
        )
    return rows


def optimize(
    step: Step,
    state: TrainState,
    batch: Batch,
    update: Update,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Metrics:
    """One iteration of a method's step on this process's share of the batch; returns its metrics.

    With `loop.accumulate` above 1, each optimizer has passes of its own: the step runs on each part of the batch, with
    the same noise, up to that optimizer's loss, and is closed there. So the student answers the discriminator's whole
    update, as it does without accumulation. The price is that forward passes before a loss run again.
    """
    rank, world, passes = parallel.rank(), parallel.world(), update.options.accumulate
    metrics: Metrics = {}
    if passes == 1:
        state.part = Part(rank, world)
        for name, loss, shown in forward(step(state, batch), autocast):
            update(name, loss)
            metrics |= {key: value.detach() for key, value in shown.items()}
        return metrics
    noise = {name: generator.get_state() for name, generator in state.random.items()}
    buffers = [buffer for network in state.networks.values() for buffer in network.buffers()]
    seen: dict[str, list[Tensor]] = {}
    for number in range(len(state.optimizers)):
        before = [buffer.clone() for buffer in buffers]
        for index, rows in enumerate(split(batch, passes)):
            for name, generator in state.random.items():
                generator.set_state(noise[name])
            state.part = Part(rank, world, index, passes)
            with closing(step(state, rows)) as objectives:
                each = forward(objectives, autocast)
                for _ in islice(each, number):
                    pass
                # Spectral norms iterate with each forward: all passes do from where the batch as a whole would.
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
                objective = next(each, None)
                if objective is None:  # not every optimizer has a loss in every iteration
                    break
                name, loss, shown = objective
                update(name, loss / passes, first=index == 0, last=index == passes - 1)
                for key, value in shown.items():
                    seen.setdefault(key, []).append(value.detach())
    # A number that some parts do not have, NaN there, is the others' mean.
    return {key: torch.stack(values).nanmean() for key, values in seen.items()}


def forward(objectives: Objectives, autocast: Callable[[], AbstractContextManager[Any]]) -> Objectives:
    """The same objectives, computed under autocast and handed out outside it.

    Backward and the optimizers have no part in autocast: in it, Muon's products lose so much that its steps go uphill.
    """
    while True:
        with autocast():
            objective = next(objectives, None)
        if objective is None:
            return
        yield objective


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch of tensors [B, ...] and lists of B, cut into equal parts in order; each has all of it as `whole`."""
    rows = len(next(iter(batch.values()))) // parts
    cut = [{key: value[i * rows : (i + 1) * rows] for key, value in batch.items()} for i in range(parts)]
    return [{**part, "whole": batch} for part in cut]


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """A network whose weights take no gradient while another one's loss passes through it."""
    # While FSDP2 has a network together it holds other parameters, and the flag must be set on those that stay.
    parallel.reshard([network])
    network.requires_grad_(False)
    try:
        yield
    finally:
        parallel.reshard([network])
        network.requires_grad_(True)


class Update:
    """Backward, average, clip and step of an optimizer; one object for each iteration.

    Args:
        on_device: let the device decide whether a step is skipped. A GPU that had to answer would stand still until it
            is given the next work.

    Attributes:
        bad: whether a gradient of this iteration was not finite, which skips that optimizer's step; a tensor where the
            device decides.
        norms: the gradient norm before clipping for each optimizer, by its name in the log.
    """

    def __init__(self, state: TrainState, options: LoopOptions, *, on_device: bool = False) -> None:
        self.bad: bool | Tensor = False
        self.norms: Metrics = {}
        self.options = options
        self._state, self._on_device = state, on_device

    def __call__(self, name: str, loss: Tensor, *, first: bool = True, last: bool = True) -> None:
        """Add the gradient of `loss`, a part of the batch's that may be its first, its last or both; then step.

        Args:
            name: the optimizer's.
        """
        optimizer = self._state.optimizers[name]
        if first:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if not last:
            return
        # Averaged before they are looked at, so that all processes decide alike whether to skip.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parallel.average_gradients(parameters)
        found = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], self.options.grad_clip)
        norm = parallel.whole(found).detach()
        self.norms[f"grad_norm/{name}"] = norm
        factor = learning_rate_factor(self._state.iteration, self.options, self._state.age(name))
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
        if self._on_device:
            bad = ~torch.isfinite(norm)
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined] # a name of torch's, for fused optimizers
            optimizer.step()
            self.bad = bad | self.bad
        elif torch.isfinite(norm):
            optimizer.step()
        else:
            self.bad = True
        optimizer.zero_grad(set_to_none=True)
        parallel.reshard(self._state.networks.values())


class Skipped:
    """Counts skipped iterations, and asks a GPU for all of them together."""

    def __init__(self) -> None:
        self._each: list[bool | Tensor] = []
        self._row = 0

    def add(self, bad: bool | Tensor) -> None:
        """One more iteration."""
        self._each.append(bad)

    @property
    def known(self) -> bool:
        """Whether nobody has to be asked."""
        return not any(isinstance(bad, Tensor) for bad in self._each)

    def ask(self, state: TrainState) -> int:
        """Add what was skipped since the last call to `state.bad_steps`; returns the longest row of skipped ones."""
        tensors = [bad for bad in self._each if isinstance(bad, Tensor)]
        answers = iter(torch.stack(tensors).tolist() if tensors else [])
        longest = self._row
        for bad in self._each:
            skipped = next(answers) if isinstance(bad, Tensor) else bad
            state.bad_steps += int(skipped)
            self._row = self._row + 1 if skipped else 0
            longest = max(longest, self._row)
        self._each = []
        return longest


def decides_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves everything as it is where its `found_inf` says so, without being asked."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused or isinstance(optimizer, (Muon, Together))


def learning_rate_factor(iteration: int, options: LoopOptions, age: int | None = None) -> float:
    """Linear warm-up over `warmup` iterations, then constant or a cosine down to 5 % at the last iteration.

    Args:
        age: iterations since the optimizer's first step; `iteration` where that was the run's first.
    """
    rise = min(1.0, ((iteration if age is None else age) + 1) / options.warmup) if options.warmup else 1.0
    if options.decay == "constant":
        return rise
    through = min(1.0, iteration / options.iterations)
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * through)))
