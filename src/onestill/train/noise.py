"""Where training's noise comes from: one generator, the same in every process, whatever their number.

A GPU draws its own, as what a CPU draws would have to be waited for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Part:
    """Which rows of a batch a process holds in pass `index` of `passes`: rank, rank + world, ... of its stretch.

    Readers give rank r the places r, r + world, ... of the data's order, so these rows are the single process's.
    """

    def __init__(self, rank: int = 0, world: int = 1, index: int = 0, passes: int = 1) -> None:
        self.rank, self.world, self.index, self.passes = rank, world, index, passes

    @property
    def parts(self) -> int:
        """How many such parts make the batch."""
        return self.world * self.passes

    def of(self, whole: Tensor, count: int) -> Tensor:
        """The `count` rows of this part, of all [parts * count, ...]."""
        if self.parts == 1:
            return whole
        start = self.index * count * self.world
        return whole[start + self.rank : start + count * self.world : self.world]


def generators(device: torch.device, seed: int) -> tuple[torch.Generator, torch.Generator]:
    """What `Draw` takes for a training on `device`: the generator of noise, and the one on the CPU; one for both there.

    Another GPU draws the same; a CPU draws other noise from the same seed.
    """
    host = torch.Generator("cpu").manual_seed(seed)
    return (torch.Generator(device).manual_seed(seed) if device.type == "cuda" else host), host


def restore(generator: torch.Generator, saved: Tensor) -> None:
    """Put a generator into a saved state; one of another kind of device goes on from a seed that the state gives."""
    if len(saved) == len(generator.get_state()):
        generator.set_state(saved)
    else:
        digest = hashlib.sha256(saved.numpy().tobytes()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little"))


class Draw:
    """Random tensors for the samples that this process holds of the whole batch.

    Every process draws for the whole batch and keeps its own rows. So sample i of an iteration meets the same noise on
    one device or on 64, in one pass or in many, and a run goes on at another world size as if nothing had changed. The
    price is each drawing the whole batch's noise: on a CPU a hundredth of a second for 128 samples of 4 x 64 x 64.

    Args:
        generator: in the same state everywhere; tensors are drawn on its device.
        part: which rows this process keeps; the default is all of them.
        host: on the CPU, for the numbers that Python needs, which no GPU is then asked for; the default is
            `generator` itself.
        device: where tensors are drawn, if not on the generator's device.
    """

    def __init__(
        self,
        generator: torch.Generator,
        part: Part | None = None,
        host: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.generator, self._part = generator, part or Part()
        self._host, self.device = host or generator, device or generator.device

    def normal(self, count: int, *shape: int) -> Tensor:
        """N(0, 1), float32 [count, *shape] on the device."""
        whole = torch.randn((count * self._part.parts, *shape), generator=self.generator, device=self.device)
        return self._part.of(whole, count)

    def uniform(self, count: int, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32 [count, *shape]."""
        whole = torch.rand((count * self._part.parts, *shape), generator=self.generator, device=self.device)
        return self._part.of(whole, count)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """Uniform in low..high, both included, int64 [count]."""
        size = (count * self._part.parts,)
        return self._part.of(torch.randint(low, high + 1, size, generator=self.generator, device=self.device), count)

    def choice(self, weights: Sequence[float], count: int) -> Tensor:
        """Indices drawn with the given relative weights, int64 [count]."""
        relative = table(tuple(weights), self.device)
        whole = torch.multinomial(relative, count * self._part.parts, replacement=True, generator=self.generator)
        return self._part.of(whole, count)

    def among(self, values: Sequence[int], weights: Sequence[float], count: int) -> Tensor:
        """Some of `values`, drawn with the given relative weights, int64 [count]."""
        return table(tuple(values), self.device)[self.choice(weights, count)]

    def shared(self, low: int, high: int, count: int) -> list[int]:
        """Integers as above, the same in every process: for what a whole batch shares."""
        return torch.randint(low, high + 1, (count,), generator=self._host).tolist()


@functools.lru_cache(maxsize=256)
def table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tensor of these numbers, copied to the device once: each copy is a wait for a GPU. Not to be changed."""
    return torch.tensor(values).to(device)
