"""Prompts -> pictures, over an engine: seeds, steps, guidance, image to image, batches, timings, files."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.Image import Image

from onestill import __version__
from onestill.checkpoint import Additions
from onestill.engine import load_engine
from onestill.engine.protocol import (
    Conditioning,
    EndToEndEngine,
    Engine,
    GenerationRequest,
    GenerationResult,
    TorchOptions,
    first_latents,
)
from onestill.errors import NotFiniteError
from onestill.noise import noise_source
from onestill.pipeline.checks import (
    MOST_IMAGES,
    MOST_STEPS,
    checked_guidance,
    checked_pair,
    checked_prompts,
    checked_size,
    checked_whole,
    matched_negatives,
    seeds_of,
)
from onestill.pipeline.loaded import LoadedInfo
from onestill.pipeline.notes import NEGATIVE_DID_NOTHING, notes_on_size, notes_on_steps, notes_on_words
from onestill.pipeline.output import Output, Timings
from onestill.pipeline.picture import fitted, save_picture
from onestill.sampling import DRAWING, classifier_free_guidance, sample, strength_timesteps

__all__ = ["Output", "Pipeline", "Timings", "load", "save_picture"]

TOGETHER = 16  # images drawn side by side, which bounds memory
PROMPTS_KEPT = 256  # whose states are remembered; some 50 KB each


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
    time_ids: tuple[int, ...] | None

    @property
    def guides(self) -> bool:
        """Whether guidance steers away from something, at twice the work."""
        return self.guidance_scale > 1


class Pipeline:
    """A loaded model that draws. Any number of threads may call it at once.

    Args:
        engine: what runs the model.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._info = LoadedInfo.of(engine)
        self._states: OrderedDict[str, Conditioning] = OrderedDict()
        self._states_lock = threading.Lock()

    @property
    def info(self) -> LoadedInfo:
        """What the model is, and which engine runs it, on which device and in which type of numbers."""
        return self._info

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
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
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
            height: pixels, divisible by 8, or one of the model's `sizes` where it has no others; None is its own.
            width: pixels, likewise.
            sampler: one of `onestill.sampling.SAMPLERS`; None is the model's own.
            original_size: (height, width) in pixels that SDXL is told the picture once had; None is its size.
            crops_coords_top_left: (top, left) in pixels that SDXL is told were cut off.
            target_size: (height, width) in pixels that SDXL is told were asked for; None is its size.
            pause: called before each stage and each call of the network; what it raises ends the drawing there. An
                engine that goes from words to pixels in one piece is stopped only between pieces.

        Raises:
            PromptError, SizeError, StepsError, ImageError, ScheduleError: nothing can be drawn from an argument.
            NotEnoughMemoryError: so many or so large pictures do not fit; the next call may.
            NotFiniteError: the model computed no picture.
        """
        started = time.perf_counter()
        pause = pause or (lambda: None)
        each = checked_whole("num_images_per_prompt", num_images_per_prompt, MOST_IMAGES)
        prompts = [text for text in checked_prompts(prompt) for _ in range(each)]
        told = (original_size, crops_coords_top_left, target_size)
        plan = self._plan(
            num_inference_steps, guidance_scale, height, width, sampler, None if image is None else strength, told
        )
        negatives = matched_negatives(negative_prompt, prompts, each)
        seeds = seeds_of(seed, len(prompts))
        picture = None if image is None else fitted(image, plan.height, plan.width)
        pause()
        start = None if picture is None else self.engine.encode_image(picture[None])
        prepared = time.perf_counter()

        draw = self._draw_whole if isinstance(self.engine, EndToEndEngine) else self._draw_in_steps
        parts = [slice(first, first + TOGETHER) for first in range(0, len(prompts), TOGETHER)]
        drawn = GenerationResult.joined(
            [draw(plan, prompts[part], negatives[part], start, seeds[part], pause) for part in parts]
        )
        images = [PIL.Image.fromarray(one) for one in drawn.pictures]
        encode_ms = (prepared - started) * 1000 + drawn.encode_ms
        total_ms = (time.perf_counter() - started) * 1000
        # Whatever else a call does, it does with pictures.
        timings = Timings(encode_ms, drawn.denoise_ms, total_ms - encode_ms - drawn.denoise_ms, total_ms)
        notes = notes_on_words(prompts, drawn.tokens_cut, drawn.words_cut)
        if negative_prompt is not None and not self._guides(plan):
            notes.append(NEGATIVE_DID_NOTHING)
        notes += notes_on_steps(plan.num_inference_steps, plan.timesteps, plan.strength)
        notes += notes_on_size(plan.height, plan.width, self.info)
        return Output(images, seeds, prompts, timings, notes, [self._settings(plan, text) for text in negatives])

    def _plan(
        self,
        steps: int | None,
        guidance_scale: float | None,
        height: int | None,
        width: int | None,
        sampler: str | None,
        strength: float | None,
        told: tuple[tuple[int, int] | None, tuple[int, int], tuple[int, int] | None],
    ) -> _Plan:
        info = self.info
        steps = checked_whole("num_inference_steps", info.num_inference_steps if steps is None else steps, MOST_STEPS)
        timesteps = info.timesteps(steps)
        if strength is not None:
            timesteps = strength_timesteps(timesteps, strength, info.schedule.num_train_timesteps)
        size = checked_size(height, width, info)
        names = ("original_size", "crops_coords_top_left", "target_size")
        pairs = [checked_pair(name, pair, size) for name, pair in zip(names, told, strict=True)]
        return _Plan(
            steps,
            tuple(timesteps),
            checked_guidance(info.guidance_scale if guidance_scale is None else guidance_scale),
            sampler or info.sampler,
            *size,
            strength,
            tuple(number for pair in pairs for number in pair) if info.is_xl else None,
        )

    def _guides(self, plan: _Plan) -> bool:
        return plan.guides and not self.info.embeds_guidance

    def _settings(self, plan: _Plan, negative: str | None) -> dict[str, str]:
        return {
            "num_inference_steps": str(plan.num_inference_steps),
            "sampler": plan.sampler,
            "guidance_scale": f"{plan.guidance_scale:g}",
            **({"negative_prompt": negative} if self._guides(plan) and negative else {}),
            **({"strength": f"{plan.strength:g}"} if plan.strength is not None else {}),
            "size": f"{plan.width}x{plan.height}",
            "model": f"{self.info.name} {self.info.version}".strip(),
            "engine": f"{self.engine.name} {self.engine.dtype}",
            "version": f"onestill {__version__}",
        }

    # --- words to pixels, by an engine that takes one step at a time ---

    def _draw_in_steps(
        self,
        plan: _Plan,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        start: NDArray[np.float32] | None,
        seeds: Sequence[int],
        pause: Callable[[], None],
    ) -> GenerationResult:
        started = time.perf_counter()
        words = self._encode(prompts)
        against = self._encode_negatives(negatives) if self._guides(plan) else None
        encoded = time.perf_counter()
        latents = self._walk(plan, words, against, start, seeds, pause)
        if not np.isfinite(latents).all():
            raise NotFiniteError.of("the latents", self.engine.dtype)
        denoised = time.perf_counter()
        pause()
        pictures = self.engine.decode(latents)
        ended = time.perf_counter()
        spent = (encoded - started, denoised - encoded, ended - denoised)
        return GenerationResult(pictures, words.tokens_cut, words.words_cut, *(1000 * seconds for seconds in spent))

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """That of the prompts, each encoded once and remembered."""
        with self._states_lock:
            known = {text: self._states[text] for text in dict.fromkeys(prompts) if text in self._states}
        new = [text for text in dict.fromkeys(prompts) if text not in known]
        if new:
            found = self.engine.encode(new)
            known |= {text: found[i : i + 1] for i, text in enumerate(new)}
        with self._states_lock:
            for text, states in known.items():
                self._states[text] = states
                self._states.move_to_end(text)
            while len(self._states) > PROMPTS_KEPT:
                self._states.popitem(last=False)
        return Conditioning.joined([known[text] for text in prompts])

    def _encode_negatives(self, negatives: Sequence[str | None]) -> Conditioning:
        words = self._encode([text or "" for text in negatives])
        if not self.info.zero_negative or any(text is not None for text in negatives):
            return words
        pooled = None if words.pooled is None else np.zeros_like(words.pooled)
        return replace(words, states=np.zeros_like(words.states), pooled=pooled)

    def _walk(
        self,
        plan: _Plan,
        words: Conditioning,
        against: Conditioning | None,
        start: NDArray[np.float32] | None,
        seeds: Sequence[int],
        pause: Callable[[], None],
    ) -> NDArray[np.float32]:
        """Latents [B, C, h, w] for B seeds and prompts; `start` [1, C, h, w] are those of an image."""
        schedule = self.info.schedule
        draw = noise_source(seeds, self._latent_shape(plan))
        x = first_latents(self.info, plan.timesteps[0], draw(0), start)
        conditioning = words if against is None else Conditioning.joined([words, against])
        conditioning = replace(
            conditioning, time_ids=_time_ids(plan, len(conditioning.states)), guidance_scale=plan.guidance_scale
        )

        def predict_x0(x: NDArray[np.float32], timestep: int) -> NDArray[np.float32]:
            pause()
            if against is None:
                output = self.engine.denoise(x, timestep, conditioning)
            else:
                both = self.engine.denoise(np.concatenate([x, x]), timestep, conditioning)
                output = classifier_free_guidance(both[: len(x)], both[len(x) :], plan.guidance_scale)
            return np.asarray(schedule.x0(output, x, timestep), dtype=np.float32)

        return np.asarray(sample(plan.sampler, predict_x0, x, schedule, plan.timesteps, draw), dtype=np.float32)

    def _latent_shape(self, plan: _Plan) -> tuple[int, int, int]:
        factor = self.info.vae_scale_factor
        return self.info.latent_shape[0], plan.height // factor, plan.width // factor

    # --- words to pixels, by an engine that goes all the way ---

    def _draw_whole(
        self,
        plan: _Plan,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        start: NDArray[np.float32] | None,
        seeds: Sequence[int],
        pause: Callable[[], None],
    ) -> GenerationResult:
        pause()
        draw = noise_source(seeds, self._latent_shape(plan))
        calls = len(plan.timesteps) if plan.sampler in DRAWING else 1
        request = GenerationRequest(
            prompts,
            negatives if self._guides(plan) else None,
            np.stack([draw(step) for step in range(calls)]),
            start,
            _time_ids(plan, len(prompts)),
            plan.sampler,
            plan.timesteps,
            plan.guidance_scale,
        )
        assert isinstance(self.engine, EndToEndEngine)  # which is why this was called
        return self.engine.generate(request)


def _time_ids(plan: _Plan, count: int) -> NDArray[np.float32] | None:
    return None if plan.time_ids is None else np.tile(np.array(plan.time_ids, dtype=np.float32), (count, 1))


def load(
    model: str | os.PathLike[str] = "icons",
    *,
    engine: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    quick_start: bool = False,
    unet: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | Mapping[str | os.PathLike[str], float] | None = None,
    tiny_vae: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    options: TorchOptions | None = None,
) -> Pipeline:
    """Load a model.

    Args:
        model: the name of a shipped model, a folder in diffusers' format, a single safetensors file, or a Hub id.
        engine: "openvino" or "torch"; None and "auto" take OpenVINO where the model has that form.
        device: "cpu"; with torch also "cuda", "cuda:1", "mps". None and "auto" take a GPU where torch draws and has
            one, and `info.device` says which; OpenVINO, and so the shipped model unless asked otherwise, is on the CPU.
        dtype: "float32", "bfloat16", "float16", or "int8" on OpenVINO; None is what the engine is fastest in.
        threads: how many CPU threads to use; None lets the engine choose.
        quick_start: for a few pictures and then no more: OpenVINO loads a third sooner and draws a fifth slower. The
            pictures are the same but for one level here and there.
        unet: another UNet in the model's place, a safetensors file or a folder with one.
        lora: a LoRA's safetensors file to add to the weights, or several, each with what it is multiplied by.
        tiny_vae: TAESD, or TAESDXL for SDXL, in the decoder's place: a safetensors file or a folder with one.
        preset: one of `onestill.checkpoint.PRESETS`, for a model whose files do not tell its steps and sampler.
        options: how torch computes; None is the fast way on a GPU and the plain way on a CPU.

    Raises:
        OnestillError: the model cannot be found, trusted or run; the sentence says what to do.
    """
    return Pipeline(
        load_engine(
            engine,
            model,
            device,
            dtype,
            threads=threads,
            quick_start=quick_start,
            additions=Additions.of(unet, lora, tiny_vae, preset),
            options=options,
        )
    )
