"""What the caller of a pipeline hears while images are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.Image import Image

from onestill.errors import StepsError
from onestill.pipeline.checks import is_whole

__all__ = ["OnPartial", "Watch", "partial_steps"]

OnPartial: TypeAlias = Callable[[int, int, Image], None]  # index of the image, index of the partial image, that image


@dataclass(frozen=True)
class Watch:
    """What is called while one batch is drawn.

    Attributes:
        pause: called before each stage and each call of the network; what it raises ends the drawing.
        on_partial: takes the partial images; None where none are wanted.
        steps: after which each image is decoded once more, counted from 1.
        first: the index of the batch's first image.
    """

    pause: Callable[[], None]
    on_partial: OnPartial | None = None
    steps: tuple[int, ...] = ()
    first: int = 0

    def batch(self, first: int) -> Watch:
        """The same for the batch that begins with image `first`."""
        return replace(self, first=first)

    def show(self, step: int, pictures: NDArray[np.uint8]) -> None:
        """Hand on the pictures [B, H, W, 3] after a step that is one of `steps`."""
        assert self.on_partial is not None
        for i, picture in enumerate(pictures):
            self.on_partial(self.first + i, self.steps.index(step), PIL.Image.fromarray(picture))


def partial_steps(wanted: int, steps: int) -> tuple[int, ...]:
    """After which of `steps` steps to show `wanted` partial images, or as many as there are: evenly, not the last.

    Raises:
        StepsError: `wanted` is no whole number from 0.
    """
    if not is_whole(wanted) or wanted < 0:
        raise StepsError(f"partial_images is {wanted}; choose a whole number from 0.")
    wanted = min(wanted, steps - 1)
    return tuple(i * steps // (wanted + 1) for i in range(1, wanted + 1))
