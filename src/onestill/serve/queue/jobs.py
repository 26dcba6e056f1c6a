"""What is asked of the model's thread, what it gives back, and why it may not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onestill.errors import OnestillError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Busy", "Closing", "EngineFault", "Job", "NotDrawn", "Picture", "Superseded", "TooLate"]


class NotDrawn(OnestillError):
    """A request that was given up. `retry_after_s` is when to try again, None where that is no help."""

    retry_after_s: float | None = None

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Busy(NotDrawn):
    """The queue is full."""


class Closing(NotDrawn):
    """The server is going away."""


class Superseded(NotDrawn):
    """A newer request of the same connection took its place."""


class TooLate(NotDrawn):
    """It waited longer than it was allowed to."""


class EngineFault(NotDrawn):
    """The engine failed, and no fault of the request's was found."""


@dataclass(frozen=True)
class Job:
    """What to draw: one picture a seed. The values are checked already; see `onestill.pipeline.Pipeline`.

    Attributes:
        height, width: pixels.
        image: a picture to start from.
        strength: how much of `image` to change.
    """

    prompt: str
    seeds: tuple[int, ...]
    num_inference_steps: int
    height: int
    width: int
    image: Image | None = None
    strength: float = 0.5

    @property
    def shape(self) -> tuple[object, ...]:
        """What jobs must share to be drawn in one call; one with an image shares only with itself."""
        return (self.num_inference_steps, self.height, self.width, id(self) if self.image is not None else 0)


@dataclass(frozen=True)
class Picture:
    """One picture of a job.

    Attributes:
        metadata: what it was drawn from, as written into files.
        notes: what was not done to the letter.
        timings: queue_ms, encode_ms, denoise_ms and decode_ms; the last three are of the call, others' pictures too.
    """

    image: Image
    seed: int
    metadata: Mapping[str, str]
    notes: Sequence[str]
    timings: Mapping[str, float]
