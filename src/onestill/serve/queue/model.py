"""The model as its thread uses it: nothing that an engine returns is believed, and an engine can be loaded anew."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from onestill.serve.queue.jobs import Job, Picture

if TYPE_CHECKING:
    from onestill.pipeline import Output, Pipeline

__all__ = ["Model", "WrongOutputError", "free_memory"]

KNOWN_PROMPT = "a red apple"  # of the picture by which an engine shows that it works


class WrongOutputError(Exception):
    """An engine returned something else than it was asked for."""


class Model:
    """A pipeline, and how to load another one.

    Args:
        pipe: a loaded model.
        load: loads it once more; None where that is not possible.
    """

    def __init__(self, pipe: Pipeline, load: Callable[[], Pipeline] | None) -> None:
        self._pipe: Pipeline | None = pipe
        self._load = load

    @property
    def can_reload(self) -> bool:
        """Whether `reload` may be called."""
        return self._load is not None

    def reload(self) -> None:
        """Load the model anew, in the place of the present one."""
        assert self._load is not None
        self._pipe = None  # first, as two may not fit into memory
        free_memory()
        self._pipe = self._load()

    def draw(
        self,
        jobs: Sequence[Job],
        seeds: Sequence[int],
        pause: Callable[[], None],
        on_partial: Callable[[int, Picture], None],
    ) -> list[Picture]:
        """Draw one picture for each job and its seed; the jobs are of equal shape. `queue_ms` is left out.

        `on_partial` is called with the index of a job and a partial image of its picture.

        Raises:
            WrongOutputError: what came back is not one picture for each, or black from an engine that does not work.
            Exception: whatever the pipeline or `pause` raises.
        """
        assert self._pipe is not None
        job = jobs[0]

        def hand_on(index: int, partial: int, image: Image) -> None:
            on_partial(index, Picture(image, seeds[index], {"prompt": jobs[index].prompt}, (), {}, partial))

        output = self._pipe(
            [one.prompt for one in jobs],
            seed=list(seeds),
            num_inference_steps=job.num_inference_steps,
            height=job.height,
            width=job.width,
            image=job.image,
            mask=job.mask,
            strength=job.strength,
            pause=pause,
            partial_images=job.partial_images,
            on_partial=hand_on,
        )
        _check(output.images, len(jobs), (job.width, job.height))
        if list(output.seeds) != list(seeds):
            raise WrongOutputError("The engine drew other seeds than it was asked for.")
        if any(_is_black(image) for image in output.images) and not self.works(pause):
            raise WrongOutputError("The engine draws black pictures.")
        return [_picture(output, index) for index in range(len(jobs))]

    def works(self, pause: Callable[[], None]) -> bool:
        """Whether the engine draws a picture of a prompt that every model can draw."""
        if self._pipe is None:
            return False
        info = self._pipe.info
        images = self._pipe([KNOWN_PROMPT], seed=[0], pause=pause).images
        _check(images, 1, (info.width, info.height))
        return not _is_black(images[0])


def free_memory() -> None:
    """Collect garbage, and give back what torch keeps of a GPU's memory."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check(images: Sequence[object], count: int, size: tuple[int, int]) -> None:
    if len(images) != count:
        raise WrongOutputError(f"The engine returned {len(images)} pictures in place of {count}.")
    for image in images:
        if not isinstance(image, Image) or image.mode != "RGB" or image.size != size:
            raise WrongOutputError(f"The engine returned something else than RGB pictures of {size[0]}x{size[1]} px.")


def _is_black(image: Image) -> bool:
    return image.getbbox() is None


def _picture(output: Output, index: int) -> Picture:
    times = {name: getattr(output.timings, name) for name in ("encode_ms", "denoise_ms", "decode_ms")}
    return Picture(output.images[index], output.seeds[index], output.metadata(index), output.notes_on(index), times)
