"""The players' turns in one iteration: backward, average, clip, step; in one pass over the batch or in several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
Step = Callable[[TrainState, Batch, "Update"], dict[str, Tensor]]
Update = Callable[[str, Tensor], Tensor]  # (optimizer's name, loss) -> gradient norm


class TurnTaken(Exception):
    """The turn that this pass over a part of the batch is for has been taken."""


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


def take_turns(
    step: Step, state: TrainState, batch: Batch, update: Updater, autocast: Callable[[], AbstractContextManager[Any]]
) -> dict[str, Tensor]:
    """One iteration of a method's step on this process's share of the batch; returns its metrics.

    With `loop.accumulate` above 1, each turn has a pass of its own over the parts of the batch: the step runs on each
    part, with the same noise, up to that turn. So the second player answers the first one's whole update, as it does
    without accumulation; the price is the forward passes before a turn, once more.
    """
    turns, rank, world = update.options.accumulate, parallel.rank(), parallel.world()
    if turns == 1:
        state.part = Part(rank, world)
        with autocast():
            return step(state, batch, update)
    before = {name: generator.get_state() for name, generator in state.random.items()}
    metrics: dict[str, Tensor] = {}
    for number in range(len(state.optimizers)):
        for turn, part in enumerate(split(batch, turns)):
            for name, generator in state.random.items():
                generator.set_state(before[name])
            state.part = Part(rank, world, turn, turns)
            update.begin(number, turn)
            try:
                with autocast():
                    found = step(state, part, update)
            except TurnTaken:
                continue
            for key, value in found.items():
                metrics[key] = metrics.get(key, torch.zeros_like(value)) + value.detach() / turns
        if metrics:  # the step ran to its end: it has no further turns in this iteration
            break
    return metrics


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch of tensors [B, ...] and lists of B, cut into equal parts in order."""
    rows = len(next(iter(batch.values()))) // parts
    return [{key: value[i * rows : (i + 1) * rows] for key, value in batch.items()} for i in range(parts)]


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """A player whose weights take no gradient, for the other one's turn; until that turn is over."""
    # While FSDP2 has a network together it holds other parameters, and the flag must be set on those that stay.
    parallel.reshard([network])
    network.requires_grad_(False)
    try:
        yield
    finally:
        parallel.reshard([network])
        network.requires_grad_(True)


class Updater:
    """One optimizer's turn. A gradient that is not finite skips the step and is remembered in `bad`.

    Gradients are averaged over the processes before they are looked at, so that all of them decide alike.

    Args:
        on_device: let the device decide, and be asked later: `bad` is a tensor then. A GPU that had to answer would
            stand still until it is given the next work.
    """

    def __init__(self, state: TrainState, options: LoopOptions, *, on_device: bool = False) -> None:
        self.bad: bool | Tensor = False
        self._on_device = on_device
        self.norms: dict[str, Tensor] = {}
        self.options = options
        self._state = state
        self._wanted: int | None = None
        self._turn = self._call = 0

    def begin(self, number: int, turn: int) -> None:
        """From now on only the `number`-th call counts, and this is its `turn`-th part of the batch."""
        self._wanted, self._turn, self._call = number, turn, 0

    def __call__(self, name: str, loss: Tensor) -> Tensor:
        call, self._call = self._call, self._call + 1
        if self._wanted is not None and call != self._wanted:
            return torch.zeros(())
        # Autocast is for the forward pass: in it, Muon's products lose so much that its steps go uphill.
        with torch.autocast(loss.device.type, enabled=False):
            return self._update(name, loss, call)

    def _update(self, name: str, loss: Tensor, call: int) -> Tensor:
        optimizer, turns = self._state.optimizers[name], self.options.accumulate
        if self._turn == 0:
            optimizer.zero_grad(set_to_none=True)
        (loss / turns if turns > 1 else loss).backward()  # type: ignore[no-untyped-call]
        norm = self._apply(name, optimizer) if self._turn == turns - 1 else torch.zeros(())
        if self._wanted is not None and call < len(self._state.optimizers) - 1:
            raise TurnTaken
        return norm

    def _apply(self, name: str, optimizer: torch.optim.Optimizer) -> Tensor:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parallel.average_gradients(parameters)
        found = nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], self.options.grad_clip)
        norm = parallel.whole(found).detach()
        self.norms[f"grad_norm/{name}"] = norm
        factor = learning_rate_factor(self._state.iteration, self.options)
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
        return norm


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


def learning_rate_factor(iteration: int, options: LoopOptions) -> float:
    """Linear warm-up over `warmup` iterations, then constant or a cosine down to 5 % at the last iteration."""
    rise = min(1.0, (iteration + 1) / options.warmup) if options.warmup else 1.0
    if options.decay == "constant":
        return rise
    through = min(1.0, iteration / options.iterations)
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * through)))
