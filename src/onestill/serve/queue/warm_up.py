"""What a server draws before anyone asks, so that nobody waits for what is compiled, loaded or recorded only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onestill.pipeline import Pipeline

__all__ = ["warm_up"]


def warm_up(pipe: Pipeline, most: int, say: Callable[[str], None]) -> None:
    """Draw what a scheduler will ask for: every number of pictures that its calls have and its engine tells apart.

    At the model's own size and number of steps, from words; other sizes, steps and pictures to start from are prepared
    when they are first asked for.

    Args:
        pipe: a loaded model.
        most: pictures in the scheduler's largest call.
        say: is given one sentence of what is drawn.
    """
    sizes = pipe.engine.warm_ups(most)
    info = pipe.info
    numbers = ", ".join(map(str, dict.fromkeys(sizes)))
    say(f"warming up: {numbers} at once, {info.width}x{info.height} px, num_inference_steps {info.num_inference_steps}")
    for turn, count in enumerate(sizes):
        # Each prompt a new one, as the states of an old one are remembered and not computed.
        pipe([f"a red apple, {turn} {number}" for number in range(count)])
