"""What the model's thread is asked to draw, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Job", "Picture"]


@dataclass(frozen=True)
class Job:
    """What to draw: one picture for each seed. The values are validated; see `onestill.pipeline.Pipeline`.

    Attributes:
        height, width: pixels.
        image: a picture to start from; None draws from noise.
        strength: how much of `image` to change.
        mask: white where to draw, black where `image` stays; None draws everywhere.
        partial_images: how many images to show of each picture while it is drawn.
    """

    prompt: str
    seeds: tuple[int, ...]
    num_inference_steps: int
    height: int
    width: int
    image: Image | None = None
    strength: float = 0.5
    mask: Image | None = None
    partial_images: int = 0

    @property
    def shape(self) -> tuple[object, ...]:
        """Jobs of equal shape can be drawn in one call; a job with an image only with itself."""
        alone = id(self) if self.image is not None else 0
        return (self.num_inference_steps, self.height, self.width, self.partial_images, alone)


@dataclass(frozen=True)
class Picture:
    """One picture of a job.

    Attributes:
        metadata: its parameters, as they are written into files.
        notes: where the result differs from the request.
        timings: queue_ms, encode_ms, denoise_ms and decode_ms; the last three are those of the whole call.
        partial: the number of a partial image, from 0; None for the picture itself.
    """

    image: Image
    seed: int
    metadata: Mapping[str, str]
    notes: Sequence[str]
    timings: Mapping[str, float]
    partial: int | None = None
