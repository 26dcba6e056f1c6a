"""Prompts -> pictures, over an engine: seeds, steps, guidance, image to image, batches, timings, files."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.Image import Image

from onestill import __version__
from onestill.checkpoint import ModelInfo
from onestill.engine import Conditioning, Engine, load_engine
from onestill.errors import EngineError, PromptError, SizeError, StepsError
from onestill.noise import noise_source
from onestill.pipeline.picture import fitted, save_picture
from onestill.sampling import classifier_free_guidance, sample, strength_timesteps
from onestill.schedule import add_noise

__all__ = ["Output", "Pipeline", "Timings", "load", "save_picture"]

MOST_STEPS = 50
MOST_IMAGES = 1000  # in one call
MOST_LETTERS = 10_000  # of a prompt, far beyond any model's tokens
MOST_GUIDANCE = 50.0
TOGETHER = 16  # images drawn side by side, which bounds memory
PROMPTS_KEPT = 256  # whose states are remembered; some 50 KB each


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one call: words (and a given image) to states, the steps, latents to pictures, all of it."""

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
    """

    images: list[Image]
    seeds: list[int]
    prompts: list[str]
    timings: Timings
    notes: list[str]
    settings: list[dict[str, str]]

    def metadata(self, index: int) -> dict[str, str]:
        """What image `index` is drawn from, as written into its file."""
        return {"prompt": self.prompts[index], "seed": str(self.seeds[index]), **self.settings[index]}

    def save(self, index: int, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Save image `index` with its parameters; see `save_picture`."""
        return save_picture(self.images[index], path, self.metadata(index), force=force)


@dataclass(frozen=True)
class _Plan:
    """The checked settings that all images of a call share."""

    num_inference_steps: int
    timesteps: tuple[int, ...]
    guidance_scale: float
    sampler: str
    height: int
    width: int
    strength: float | None


class Pipeline:
    """A loaded model that draws. Any number of threads may call it at once.

    Args:
        engine: what runs the model.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._states: OrderedDict[str, tuple[NDArray[np.float32], int]] = OrderedDict()
        self._states_lock = threading.Lock()

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        return self.engine.info

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Image | NDArray[np.uint8] | None = None,
        strength: float = 0.5,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        pause: Callable[[], None] | None = None,
    ) -> Output:
        """Draw.

        Args:
            prompt: what to draw, or several of them.
            image: a picture to start from, PIL or uint8 [H, W, 3]; fitted to the size by cutting its longer sides.
            strength: how much of `image` to change, above 0 and at most 1.
            num_inference_steps: 1 to 50; None is the model's own.
            guidance_scale: above 1, how hard to follow the words, at twice the work; None is the model's own.
            negative_prompt: what guidance steers away from, one for all prompts or one for each; None is nothing.
            seed: image i has seed `seed + i`; a list gives each image its own; None draws one.
            num_images_per_prompt: how many of each.
            height: pixels, one of the model's `sizes`; None is its own.
            width: pixels, likewise.
            sampler: one of `onestill.sampling.SAMPLERS`; None is the model's own.
            pause: called before each stage and each call of the network; what it raises ends the drawing there.

        Raises:
            PromptError, SizeError, StepsError, ImageError, ScheduleError: nothing can be drawn from an argument.
            EngineError: the engine's numbers are not finite.
        """
        started = time.perf_counter()
        pause = pause or (lambda: None)
        each = _checked_whole("num_images_per_prompt", num_images_per_prompt, MOST_IMAGES)
        prompts = [text for text in _checked_prompts(prompt) for _ in range(each)]
        plan = self._plan(
            num_inference_steps, guidance_scale, height, width, sampler, None if image is None else strength
        )
        negatives = _matched_negatives(negative_prompt, prompts, each)
        seeds = _seeds(seed, len(prompts))
        picture = None if image is None else fitted(image, plan.height, plan.width)

        pause()
        words, notes = self._encode(prompts)
        against = self._encode(negatives)[0] if plan.guidance_scale > 1 else None
        start = None if picture is None else self.engine.encode_image(picture[None])
        encoded = time.perf_counter()

        latents = []
        for first in range(0, len(prompts), TOGETHER):
            part = slice(first, first + TOGETHER)
            latents.append(
                self._draw(plan, words[part], None if against is None else against[part], start, seeds[part], pause)
            )
        if not all(np.isfinite(some).all() for some in latents):
            raise EngineError("The engine's numbers are not finite; try another dtype, such as float32.")
        denoised = time.perf_counter()

        pause()
        images = [PIL.Image.fromarray(drawn) for some in latents for drawn in self.engine.decode(some)]
        ended = time.perf_counter()
        timings = Timings(
            encode_ms=(encoded - started) * 1000,
            denoise_ms=(denoised - encoded) * 1000,
            decode_ms=(ended - denoised) * 1000,
            total_ms=(ended - started) * 1000,
        )
        settings = [self._settings(plan, negative) for negative in negatives]
        return Output(images, seeds, prompts, timings, notes, settings)

    def _plan(
        self,
        steps: int | None,
        guidance_scale: float | None,
        height: int | None,
        width: int | None,
        sampler: str | None,
        strength: float | None,
    ) -> _Plan:
        info = self.info
        steps = _checked_whole("num_inference_steps", info.num_inference_steps if steps is None else steps, MOST_STEPS)
        timesteps = info.schedule.timesteps(steps)
        if strength is not None:
            timesteps = strength_timesteps(timesteps, strength, info.schedule.num_train_timesteps)
        return _Plan(
            steps,
            tuple(timesteps),
            _checked_guidance(info.guidance_scale if guidance_scale is None else guidance_scale),
            sampler or info.sampler,
            *_checked_size(height, width, info),
            strength,
        )

    def _settings(self, plan: _Plan, negative: str) -> dict[str, str]:
        return {
            "num_inference_steps": str(plan.num_inference_steps),
            "sampler": plan.sampler,
            "guidance_scale": f"{plan.guidance_scale:g}",
            **({"negative_prompt": negative} if plan.guidance_scale > 1 and negative else {}),
            **({"strength": f"{plan.strength:g}"} if plan.strength is not None else {}),
            "size": f"{plan.width}x{plan.height}",
            "model": f"{self.info.name} {self.info.version}".strip(),
            "engine": f"{self.engine.name} {self.engine.dtype}",
            "version": f"onestill {__version__}",
        }

    def _encode(self, prompts: Sequence[str]) -> tuple[NDArray[np.float32], list[str]]:
        """States [B, K, D] of the prompts, each encoded once and remembered, and notes on those that were cut."""
        with self._states_lock:
            known = {text: self._states[text] for text in dict.fromkeys(prompts) if text in self._states}
        new = [text for text in dict.fromkeys(prompts) if text not in known]
        if new:
            found = self.engine.encode(new)
            known |= {text: (found.states[i], found.tokens_cut[i]) for i, text in enumerate(new)}
        with self._states_lock:
            for text, states in known.items():
                self._states[text] = states
                self._states.move_to_end(text)
            while len(self._states) > PROMPTS_KEPT:
                self._states.popitem(last=False)
        notes = [
            f"The prompt '{_shortened(text)}' is too long: its last {cut} tokens were cut."
            for text, (_, cut) in known.items()
            if cut
        ]
        return np.stack([known[text][0] for text in prompts]), notes

    def _draw(
        self,
        plan: _Plan,
        cond: NDArray[np.float32],
        uncond: NDArray[np.float32] | None,
        start: NDArray[np.float32] | None,
        seeds: Sequence[int],
        pause: Callable[[], None],
    ) -> NDArray[np.float32]:
        """Latents [B, C, h, w] for B seeds and states [B, K, D]; `start` [1, C, h, w] are those of an image."""
        schedule = self.info.schedule
        draw = noise_source(seeds, self.info.latent_shape if start is None else start.shape[1:])
        alpha, sigma = schedule.at(plan.timesteps[0])
        x = add_noise(0.0 if start is None else start, draw(0), alpha, sigma)
        states = cond if uncond is None else np.concatenate([cond, uncond])
        conditioning = Conditioning(states, (0,) * len(states))

        def predict_x0(x: NDArray[np.float32], timestep: int) -> NDArray[np.float32]:
            pause()
            if uncond is None:
                output = self.engine.denoise(x, timestep, conditioning)
            else:
                both = self.engine.denoise(np.concatenate([x, x]), timestep, conditioning)
                output = classifier_free_guidance(both[: len(x)], both[len(x) :], plan.guidance_scale)
            return np.asarray(schedule.x0(output, x, timestep), dtype=np.float32)

        return np.asarray(sample(plan.sampler, predict_x0, x, schedule, plan.timesteps, draw), dtype=np.float32)


def load(
    model: str | os.PathLike[str] = "icons",
    *,
    engine: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> Pipeline:
    """Load a model.

    Args:
        model: the name of a shipped model, or a folder in diffusers' format.
        engine: "openvino" or "torch"; None takes OpenVINO where it can.
        device: "cpu"; with torch also "cuda" and the like.
        dtype: "float32", "bfloat16" or "float16"; None is float32 on a CPU.
        threads: how many CPU threads to use; None lets the engine choose.

    Raises:
        OnestillError: the model cannot be found, trusted or run; the sentence says what to do.
    """
    return Pipeline(load_engine(engine, model, device, dtype, threads=threads))


# --- checks ---------------------------------------------------------------------------------------------------------


def _checked_prompts(prompt: str | Sequence[str]) -> list[str]:
    prompts = _listed(prompt)
    for text in prompts:
        _check_text(text)
    if not prompts or not all(text.strip() for text in prompts):
        raise PromptError("The prompt is empty; say what to draw, such as 'a red apple'.")
    return prompts


def _listed(prompt: object) -> list[str]:
    return list(prompt) if isinstance(prompt, list | tuple) else [prompt]  # type: ignore[list-item] # checked next


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise PromptError(f"A prompt must be text, not {type(text).__name__}.")
    if len(text) > MOST_LETTERS:
        raise PromptError(f"The prompt has {len(text)} letters; write at most {MOST_LETTERS}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError("The prompt is no valid Unicode text; check the encoding it was read with.") from error


def _matched_negatives(negative: str | Sequence[str] | None, prompts: Sequence[str], each: int) -> list[str]:
    """One negative prompt per image."""
    negatives = _listed("" if negative is None else negative)
    for text in negatives:
        _check_text(text)
    if not isinstance(negative, list | tuple):
        return negatives * len(prompts)
    if len(negatives) * each != len(prompts):
        raise PromptError(
            f"{len(negatives)} negative prompts do not match {len(prompts) // each} prompts; give as many."
        )
    return [text for text in negatives for _ in range(each)]


def _checked_whole(name: str, value: int, most: int) -> int:
    if not _is_whole(value) or not 1 <= value <= most:
        raise StepsError(f"{name} is {value}; choose a whole number from 1 to {most}.")
    return int(value)


def _checked_guidance(scale: object) -> float:
    if not isinstance(scale, int | float | np.number) or not 0 <= scale <= MOST_GUIDANCE:
        raise StepsError(f"guidance_scale is {scale}; choose a number from 0 to {MOST_GUIDANCE:g}, 1 for none.")
    return float(scale)


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if count > MOST_IMAGES:
        raise StepsError(f"{count} images are too many for one call; ask for at most {MOST_IMAGES}.")
    if isinstance(seed, list | tuple):
        if len(seed) != count:
            raise StepsError(f"{len(seed)} seeds do not match {count} images; give as many.")
        return [_checked_seed(one, 1) for one in seed]
    first = _checked_seed(secrets.randbelow(2**32 - count) if seed is None else seed, count)
    return [first + i for i in range(count)]


def _checked_seed(first: Any, count: int) -> int:
    if not _is_whole(first) or not 0 <= first <= 2**63 - count:
        raise StepsError(f"The seed is {first}; choose a whole number from 0 to {2**63 - count}.")
    return int(first)


def _checked_size(height: int | None, width: int | None, info: ModelInfo) -> tuple[int, int]:
    size = (info.height if height is None else height, info.width if width is None else width)
    if size not in info.sizes:
        names = ", ".join(f"{width}x{height}" for height, width in info.sizes)
        raise SizeError(f"The model '{info.name}' cannot draw {size[1]}x{size[0]} pixels; choose from {names}.")
    return size


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40].rstrip()}…"
