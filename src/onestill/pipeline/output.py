"""What a call of a pipeline gives back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from onestill.pipeline.picture import save_picture


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one call: encoding the prompts and a given image, the steps, decoding, all of it."""

    encode_ms: float
    denoise_ms: float
    decode_ms: float
    total_ms: float


@dataclass(frozen=True)
class Output:
    """What one call drew. The lists are parallel, prompt-major: every image of the first prompt comes first.

    Attributes:
        images: PIL images, RGB.
        seeds: the seed that draws each again, alone.
        prompts: the prompt of each.
        timings: of the whole call.
        notes: sentences on what was not done to the letter, such as how many tokens did not fit.
        settings: what else each was drawn with: model, version, num_inference_steps, sampler, guidance_scale, ...
        prompt_notes: those of `notes` that are about one prompt, by prompt.
    """

    images: list[Image]
    seeds: list[int]
    prompts: list[str]
    timings: Timings
    notes: list[str]
    settings: list[dict[str, str]]
    prompt_notes: dict[str, str] = field(default_factory=dict)

    def notes_on(self, index: int) -> list[str]:
        """The notes that concern image `index`: none on another's prompt."""
        own = self.prompt_notes.get(self.prompts[index])
        return [note for note in self.notes if note == own or note not in self.prompt_notes.values()]

    def metadata(self, index: int) -> dict[str, str]:
        """What image `index` is drawn from, as written into its file."""
        return {"prompt": self.prompts[index], "seed": str(self.seeds[index]), **self.settings[index]}

    def save(self, index: int, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Save image `index` with its parameters; see `save_picture`."""
        return save_picture(self.images[index], path, self.metadata(index), force=force)
