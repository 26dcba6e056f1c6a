"""Prompts -> pictures, over an engine: seeds, steps, guidance, image to image, batches, timings."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.Image import Image

from onestill.checkpoint import Additions
from onestill.engine import load_engine
from onestill.engine.prompt_cache import PromptCache
from onestill.engine.protocol import (
    Conditioning,
    EndToEndEngine,
    Engine,
    GenerationRequest,
    GenerationResult,
    TorchOptions,
    first_latents,
)
from onestill.errors import ImageError, NotFiniteError, require
from onestill.noise import noise_source
from onestill.pipeline.checks import MOST_IMAGES, checked_prompts, checked_whole, matched_negatives, seeds_of
from onestill.pipeline.loaded import LoadedInfo
from onestill.pipeline.masks import Start, fitted_mask
from onestill.pipeline.notes import notes_on, notes_on_prompts
from onestill.pipeline.output import Output, Timings
from onestill.pipeline.picture import fitted, save_picture
from onestill.pipeline.plan import Plan
from onestill.pipeline.watch import OnPartial, Watch, partial_steps
from onestill.sampling import DRAWING, PredictX0, classifier_free_guidance, inpainting, sample

if TYPE_CHECKING:
    from onestill.networks.scheduler import DiffusersScheduler

__all__ = ["Output", "Pipeline", "Timings", "load", "save_picture"]

MOST_AT_ONCE = 16  # images in one batch, which bounds memory


@dataclass(frozen=True)
class _Drawing:
    """What a call draws, or a batch of it: B prompts, negative prompts and seeds, and what they start from."""

    plan: Plan
    prompts: Sequence[str]
    negatives: Sequence[str | None]
    seeds: Sequence[int]
    start: Start | None
    watch: Watch

    def batches(self) -> Iterator[_Drawing]:
        for first in range(0, len(self.prompts), MOST_AT_ONCE):
            part = slice(first, first + MOST_AT_ONCE)
            yield replace(
                self,
                prompts=self.prompts[part],
                negatives=self.negatives[part],
                seeds=self.seeds[part],
                watch=self.watch.batch(first),
            )


class Pipeline:
    """A loaded model that draws. Any number of threads may call it at once.

    Args:
        engine: what runs the model.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._info = LoadedInfo.of(engine)
        self._prompts = PromptCache(self._encode_new)
        self._scheduler = by_diffusers(self._info.scheduler) if self._info.scheduler else None

    @property
    def info(self) -> LoadedInfo:
        """What the model is, and which engine runs it, on which device and in which type of numbers."""
        return self._info

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: Image | NDArray[np.uint8] | None = None,
        mask: Image | NDArray[np.uint8] | None = None,
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
        partial_images: int = 0,
        on_partial: OnPartial | None = None,
    ) -> Output:
        """Draw.

        Args:
            prompt: what to draw, or several of them.
            image: a picture to start from, PIL or uint8 [H, W, 3]; fitted to the size by cutting its longer sides.
            mask: which part of `image` to draw, of the same size; the rest stays as it is. With an alpha channel, what
                is transparent is drawn, else what is white.
            strength: how much of `image` to change, above 0 and at most 1; with a mask, of what is inside it.
            num_inference_steps: 1 to 50; None is the model's own.
            guidance_scale: above 1, how closely to follow the prompt, at twice the work; None is the model's own.
            negative_prompt: what guidance steers away from, one for all prompts or one for each; None is nothing.
            seed: image i has seed `seed + i`; a list gives each image its own; None draws one.
            num_images_per_prompt: how many of each.
            height: pixels, divisible by 8, or one of the model's `sizes` where it has no others; None is its own.
            width: pixels, likewise.
            sampler: one of `onestill.sampling.SAMPLERS`; None is the model's own.
            original_size: (height, width) in pixels that SDXL takes the picture to have had; None is its size.
            crops_coords_top_left: (top, left) in pixels that SDXL takes to have been cut off.
            target_size: (height, width) in pixels that SDXL takes to be wanted; None is its size.
            pause: called before each stage and each call of the network; what it raises ends the drawing there. An
                engine that goes from prompts to pictures by itself is stopped only between batches.
            partial_images: how many times to decode each image while it is drawn, after steps that are spread evenly.
                There are fewer where there are fewer steps, and none of one step. Each costs a call of the decoder.
            on_partial: called with an image's index in the output, the partial image's own index, and the image.

        Raises:
            PromptError, SizeError, StepsError, ImageError, ScheduleError: nothing can be drawn from an argument.
            NotEnoughMemoryError: so many or so large pictures do not fit; the next call may.
            NotFiniteError: the model produced NaN or infinity.
        """
        started = time.perf_counter()
        pause = pause or (lambda: None)
        each = checked_whole("num_images_per_prompt", num_images_per_prompt, MOST_IMAGES)
        prompts = [text for text in checked_prompts(prompt) for _ in range(each)]
        plan = Plan.of(
            self.info,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            sampler=sampler,
            strength=None if image is None else strength,
            micro_conditioning={
                "original_size": original_size,
                "crops_coords_top_left": crops_coords_top_left,
                "target_size": target_size,
            },
        )
        negatives = matched_negatives(negative_prompt, prompts, each)
        seeds = seeds_of(seed, len(prompts))
        watch = Watch(pause, on_partial, partial_steps(partial_images if on_partial else 0, len(plan.timesteps)))
        start = self._start(image, mask, plan, pause)
        prepared = time.perf_counter()

        # An engine that goes all the way has no image before the last step.
        draws_whole = isinstance(self.engine, EndToEndEngine) and not (watch.steps or plan.scheduler)
        draw = self._draw_whole if draws_whole else self._draw_in_steps
        drawing = _Drawing(plan, prompts, negatives, seeds, start, watch)
        drawn = GenerationResult.joined([draw(batch) for batch in drawing.batches()])
        pictures = drawn.pictures if start is None else start.composite(drawn.pictures)
        images = [PIL.Image.fromarray(one) for one in pictures]
        encode_ms = (prepared - started) * 1000 + drawn.encode_ms
        total_ms = (time.perf_counter() - started) * 1000
        # The decoder's share is all the rest, as making PIL images counts as decoding.
        timings = Timings(encode_ms, drawn.denoise_ms, total_ms - encode_ms - drawn.denoise_ms, total_ms)
        of_prompts = notes_on_prompts(prompts, drawn)
        partials = (partial_images, len(watch.steps))
        others = notes_on(plan, start, has_negative=negative_prompt is not None, partial_images=partials)
        settings = [plan.metadata(text, is_masked=mask is not None) for text in negatives]
        return Output(images, seeds, prompts, timings, [*of_prompts.values(), *others], settings, of_prompts)

    def _start(
        self,
        image: Image | NDArray[np.uint8] | None,
        mask: Image | NDArray[np.uint8] | None,
        plan: Plan,
        pause: Callable[[], None],
    ) -> Start | None:
        if image is None:
            if mask is not None:
                raise ImageError("A mask needs the image that it belongs to; give image too.")
            pause()
            return None
        picture = fitted(image, plan.height, plan.width)
        weights = None if mask is None else fitted_mask(mask, image, plan.height, plan.width)
        pause()
        return Start(picture, weights, self.engine.encode_image(picture[None]))

    # --- prompts to pictures, by an engine that takes one step at a time ---

    def _draw_in_steps(self, batch: _Drawing) -> GenerationResult:
        started = time.perf_counter()
        conditioning = self._encode(batch.prompts)
        away_from = self._encode_negatives(batch.negatives) if batch.plan.guides else None
        encoded = time.perf_counter()
        latents = self._sampling_loop(batch, conditioning, away_from)
        if not np.isfinite(latents).all():
            raise NotFiniteError.of("the latents", self.engine.dtype)
        denoised = time.perf_counter()
        batch.watch.pause()
        pictures = self.engine.decode(latents)
        ended = time.perf_counter()
        spent = (encoded - started, denoised - encoded, ended - denoised)
        return GenerationResult(
            pictures, conditioning.tokens_cut, conditioning.words_cut, *(1000 * seconds for seconds in spent)
        )

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning.joined(self._prompts(prompts))

    def _encode_new(self, prompts: list[str]) -> list[Conditioning]:
        found = self.engine.encode(prompts)
        return [found[i : i + 1] for i in range(len(prompts))]

    def _encode_negatives(self, negatives: Sequence[str | None]) -> Conditioning:
        found = self._encode([text or "" for text in negatives])
        if not self.info.zero_negative or any(text is not None for text in negatives):
            return found
        # SDXL was trained with zeros, and not with the states of an empty prompt, for no prompt at all.
        pooled = None if found.pooled is None else np.zeros_like(found.pooled)
        return replace(found, states=np.zeros_like(found.states), pooled=pooled)

    def _sampling_loop(
        self, batch: _Drawing, prompts: Conditioning, negatives: Conditioning | None
    ) -> NDArray[np.float32]:
        """Latents [B, C, h, w]."""
        plan, start = batch.plan, batch.start
        latents, mask = (None, None) if start is None else (start.latents, start.latent_mask)
        conditioning = prompts if negatives is None else Conditioning.joined([prompts, negatives])
        conditioning = replace(
            conditioning, time_ids=plan.time_ids(len(conditioning.states)), guidance_scale=plan.guidance_scale
        )

        def predict(x: NDArray[np.float32], timestep: float) -> NDArray[np.float32]:
            batch.watch.pause()
            if negatives is None:
                return self.engine.denoise(x, timestep, conditioning)
            both = self.engine.denoise(np.concatenate([x, x]), timestep, conditioning)
            return classifier_free_guidance(both[: len(x)], both[len(x) :], plan.guidance_scale)  # type: ignore[no-any-return]

        if self._scheduler is not None and plan.scheduler:
            return self._scheduler.sample(
                predict, batch.seeds, plan.latent_shape, plan.num_inference_steps, latents, plan.strength, mask
            )
        schedule = self.info.schedule
        draw = noise_source(batch.seeds, plan.latent_shape)
        noise = draw(0)
        x = first_latents(self.info, plan.timesteps[0], noise, latents)

        def predict_x0(x: NDArray[np.float32], timestep: int) -> NDArray[np.float32]:
            return np.asarray(schedule.x0(predict(x, timestep), x, timestep), dtype=np.float32)

        estimate: PredictX0 = predict_x0
        if mask is not None:
            estimate = inpainting(estimate, schedule, mask, latents, noise)
        if batch.watch.steps:
            estimate = self._shown(estimate, start, batch.watch)
        return np.asarray(sample(plan.sampler, estimate, x, schedule, plan.timesteps, draw), dtype=np.float32)

    def _shown(self, predict_x0: PredictX0, start: Start | None, watch: Watch) -> PredictX0:
        """A network whose estimates are decoded and handed on after the steps that `watch` names."""
        steps = itertools.count(1)

        def predict_and_show(x: NDArray[np.float32], timestep: int) -> NDArray[np.float32]:
            x0: NDArray[np.float32] = predict_x0(x, timestep)
            if (step := next(steps)) in watch.steps:
                watch.pause()
                pictures = self.engine.decode(x0)
                watch.show(step, pictures if start is None else start.composite(pictures))
            return x0

        return predict_and_show

    # --- prompts to pictures, by an engine that goes all the way ---

    def _draw_whole(self, batch: _Drawing) -> GenerationResult:
        batch.watch.pause()
        plan, start = batch.plan, batch.start
        draw = noise_source(batch.seeds, plan.latent_shape)
        calls = len(plan.timesteps) if plan.sampler in DRAWING else 1
        request = GenerationRequest(
            batch.prompts,
            batch.negatives if plan.guides else None,
            np.stack([draw(step) for step in range(calls)]),
            None if start is None else start.latents,
            plan.time_ids(len(batch.prompts)),
            plan.sampler,
            plan.timesteps,
            plan.guidance_scale,
            None if start is None else start.latent_mask,
        )
        assert isinstance(self.engine, EndToEndEngine)  # which is why this was called
        return self.engine.generate(request)


def by_diffusers(config: Mapping[str, Any]) -> DiffusersScheduler:
    """The scheduler of a config, by diffusers' own class.

    Raises:
        MissingExtraError: diffusers is not installed.
        ScheduleError: it refuses the config.
    """
    for package in ("torch", "diffusers"):
        require(package, "torch")
    from onestill.networks.scheduler import DiffusersScheduler

    return DiffusersScheduler(config)


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
    schedule: str | None = None,
    embedding: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
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
        preset: one of `onestill.checkpoint.PRESETS`, for a model whose files do not say its steps and sampler.
        schedule: one of `onestill.checkpoint.SCHEDULES`, for a model whose files do not say what its output means.
        embedding: a safetensors file, or several, with a trained word for prompts (textual inversion): the name of its
            tensor, or of the file where that is `emb_params` or `clip_l`.
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
            additions=Additions.of(unet, lora, tiny_vae, preset, schedule, embedding),
            options=options,
        )
    )
