"""Warming up: what the engine compiles, loads or records only once is done before the first request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onestill.pipeline import Pipeline

__all__ = ["warm_up"]


def warm_up(pipe: Pipeline, most: int, say: Callable[[str], None]) -> float:
    """Draw a batch of every size that a scheduler's calls have and the engine prepares separately.

    The pictures have the model's own size and number of steps, and start from noise. Other sizes and steps, and image
    to image, are prepared at their first request.

    Args:
        pipe: a loaded model.
        most: pictures in the scheduler's largest call.
        say: is called with one sentence about what is drawn.

    Returns:
        How many seconds the slowest call took.
    """
    sizes = pipe.engine.warm_ups(most)
    info = pipe.info
    numbers = ", ".join(map(str, dict.fromkeys(sizes)))
    say(f"warming up: {numbers} at once, {info.width}x{info.height} px, num_inference_steps {info.num_inference_steps}")
    slowest_s = 0.0
    for call, count in enumerate(sizes):
        started = time.monotonic()
        # Each prompt is a new one, as the states of an old one come from the cache.
        pipe([f"a red apple, {call} {number}" for number in range(count)])
        slowest_s = max(slowest_s, time.monotonic() - started)
    return slowest_s
