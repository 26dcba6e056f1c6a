"""Where training's noise comes from: one generator, the same in every process, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Part:
    """Which rows of a batch a process holds in one pass: rank, rank + world, ... of the pass's stretch.

    Readers give rank r the places r, r + world, ... of the data's order, so these rows are the single process's.
    """

    def __init__(self, rank: int = 0, world: int = 1, turn: int = 0, turns: int = 1) -> None:
        self.rank, self.world, self.turn, self.turns = rank, world, turn, turns

    @property
    def parts(self) -> int:
        """How many such parts make the batch."""
        return self.world * self.turns

    def of(self, whole: Tensor, count: int) -> Tensor:
        """The `count` rows of this part, of all [parts * count, ...]."""
        if self.parts == 1:
            return whole
        start = self.turn * count * self.world
        return whole[start + self.rank : start + count * self.world : self.world]


class Draw:
    """Random tensors for the samples that this process holds of the whole batch.

    Every process draws for the whole batch and keeps its own rows. So sample i of an iteration meets the same noise on
    one device or on 64, in one pass or in many, and a run goes on at another world size as if nothing had changed. The
    price is a CPU drawing the whole batch's noise: a hundredth of a second for 128 samples of 4 x 64 x 64.

    Args:
        generator: on the CPU, in the same state everywhere.
        part: which rows this process keeps; all of them, unless told.
    """

    def __init__(self, generator: torch.Generator, part: Part | None = None) -> None:
        self.generator, self._part = generator, part or Part()

    def normal(self, count: int, *shape: int) -> Tensor:
        """N(0, 1), float32 [count, *shape] on the CPU."""
        return self._part.of(torch.randn((count * self._part.parts, *shape), generator=self.generator), count)

    def uniform(self, count: int, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32 [count, *shape]."""
        return self._part.of(torch.rand((count * self._part.parts, *shape), generator=self.generator), count)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """Uniform in low..high, both included, int64 [count]."""
        return self._part.of(torch.randint(low, high + 1, (count * self._part.parts,), generator=self.generator), count)

    def choice(self, weights: Sequence[float] | Tensor, count: int) -> Tensor:
        """Indices drawn with the given relative weights, int64 [count]."""
        every = torch.multinomial(
            torch.as_tensor(weights), count * self._part.parts, replacement=True, generator=self.generator
        )
        return self._part.of(every, count)

    def shared(self, low: int, high: int, count: int) -> list[int]:
        """Integers as above, the same in every process: for what a whole batch shares."""
        return torch.randint(low, high + 1, (count,), generator=self.generator).tolist()
