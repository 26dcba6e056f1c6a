"""A loaded pipeline as a contender: how it draws prompts of given seeds, and which settings name its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onestill.evaluate.protocol import Contender, Generate, Pictures
from onestill.evaluate.weights import fingerprint
from onestill.pipeline import Pipeline


def name_at(group: str, num_inference_steps: int) -> str:
    """What a contender is called at a number of steps: "teacher, 50 steps"."""
    return f"{group}, {num_inference_steps} step{'s' if num_inference_steps > 1 else ''}"


def pipeline_contender(
    pipe: Pipeline, group: str, num_inference_steps: int, guidance_scale: float, sampler: str | None = None
) -> Contender:
    """A pipeline at one number of steps; `sampler` None is the model's own.

    The settings hold a hash of its weights, so that saved pictures are never taken for another model's.
    """
    sampler = sampler or pipe.info.sampler
    settings = {
        "weights": fingerprint(pipe.info),
        "engine": pipe.engine.name,
        "device": pipe.engine.device,
        "dtype": pipe.engine.dtype,
        "sampler": sampler,
    }
    return Contender(
        name=name_at(group, num_inference_steps),
        generate=_generate(pipe, num_inference_steps, guidance_scale, sampler),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        group=group,
        settings=settings,
    )


def _generate(pipe: Pipeline, num_inference_steps: int, guidance_scale: float, sampler: str) -> Generate:
    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Pictures:
        images = []
        for start, end in _consecutive(seeds):
            images += pipe(
                prompts[start:end],
                seed=int(seeds[start]),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                sampler=sampler,
            ).images
        return np.stack([np.asarray(image) for image in images])

    return generate


def _consecutive(seeds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, end) of every longest run of seeds that go up by one, which is what one call of a pipeline draws."""
    start = 0
    for i in range(1, len(seeds) + 1):
        if i == len(seeds) or seeds[i] != seeds[i - 1] + 1:
            yield start, i
            start = i
