"""A seed names an image: the noise that torch's CPU generator draws, without torch.

`Generator(seed).randn(shape)` equals `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` to about
float32 rounding, for every shape and for any sequence of draws, so that a seed means the same picture on every engine.
Each image has its own generator: its noise does not depend on how many other images are drawn beside it.

What torch does, and so what is done here:

- Words: MT19937, seeded with the low 32 bits of the seed.
- 16 numbers or more: one word each, its low 24 bits over 2^24 a uniform in [0, 1). Each block of 16 becomes normals by
  Box-Muller: the first eight give radii, the last eight angles, cosines come first, then sines. Where 16 does not
  divide the length, the last 16 numbers are drawn once more, from 16 new words.
- Fewer than 16: one after the other in double precision, two words to a uniform and two uniforms to a pair of normals;
  the pair's second half waits in the generator for the next short draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from onestill.errors import StepsError

__all__ = ["Generator", "draw_noise", "noise_source"]

_BLOCK = 16


class Generator:
    """A stream of standard normals, equal to torch's on the CPU.

    Args:
        seed: from -2^63 to 2^64 - 1, torch's range. Only the low 32 bits count: 2^32 is the stream of 0, and -1 that of
            2^32 - 1.

    Raises:
        StepsError: outside that range.
    """

    def __init__(self, seed: int) -> None:
        if not -(2**63) <= seed < 2**64:
            raise StepsError(f"The seed {seed} is out of range; choose a whole number from 0 to 4294967295.")
        # NumPy promises that RandomState's stream for a seed never changes (NEP 19); of its Generator it does not.
        self._words = np.random.RandomState(seed % 2**32)
        self._waiting: float | None = None

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next N(0, 1) numbers, float32 of this shape."""
        count = math.prod(shape)
        values = self._draw_short(count) if count < _BLOCK else self._draw_long(count)
        return values.astype(np.float32).reshape(tuple(shape))

    def _draw_long(self, count: int) -> NDArray[np.float64]:
        whole = count - count % _BLOCK
        uniforms = self._uniforms(count)
        values = np.empty(count)
        values[:whole] = _box_muller(uniforms[:whole])
        if whole < count:
            values[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return values

    def _uniforms(self, count: int) -> NDArray[np.float64]:
        words = self._words.randint(0, 2**32, size=count, dtype=np.uint32)
        return (words & 0xFFFFFF) / 2.0**24

    def _draw_short(self, count: int) -> NDArray[np.float64]:
        return np.array([self._next_normal() for _ in range(count)])

    def _next_normal(self) -> float:
        if self._waiting is not None:
            value, self._waiting = self._waiting, None
            return value
        high1, low1, high2, low2 = (int(w) for w in self._words.randint(0, 2**32, size=4, dtype=np.uint32))
        u1 = (((high1 << 32) | low1) % 2**53) / 2.0**53
        u2 = (((high2 << 32) | low2) % 2**53) / 2.0**53
        radius, angle = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._waiting = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniforms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Uniforms in [0, 1), a multiple of 16 of them -> as many N(0, 1), block by block."""
    halves = uniforms.reshape(-1, 2, _BLOCK // 2)  # [blocks, (radius, angle), 8]
    radius = np.sqrt(-2.0 * np.log1p(-halves[:, 0]))
    # torch rounds the angle to float32. Doing the same divides the difference from it by three; the rest stays in
    # float64 so that the result is the same on every machine.
    angle = (np.float32(2.0 * np.pi) * halves[:, 1].astype(np.float32)).astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> NDArray[np.float32]:
    """The first noise of every seed: [B, *shape] float32, B = len(seeds)."""
    return noise_source(seeds, shape)(0)


def noise_source(seeds: Sequence[int], shape: Sequence[int]) -> Callable[[int], NDArray[np.float32]]:
    """A `draw` for the samplers: each call gives the next [B, *shape] float32, one generator a seed.

    The first call is the noise to start from, what `draw_noise` gives; the later ones are diffusers' order for a list
    of generators. The argument is the sampling step, which a generator does not need.
    """
    generators = [Generator(seed) for seed in seeds]

    def draw(step: int) -> NDArray[np.float32]:
        return np.stack([generator.randn(shape) for generator in generators])

    return draw
