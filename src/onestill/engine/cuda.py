"""The fast torch engine: words to pixels in three calls, each a CUDA graph on a GPU. `[torch]`

A diffusion UNet is thousands of small kernels, and starting them from Python takes several times as long as running
them. A graph starts them all at once; it demands the same shapes and the same memory each time, so there is one for
each bucket: number of images (1, 2, 4 or 8), size, sampler and timesteps. What a bucket computes is an ordinary
function of tensors, `Bucket.latents` and its neighbours; without a GPU it is called as it is, which is how it is tested
against `onestill.engine.torch`.

Shapes: B images, N noises, K tokens, D width of a token's state, P of a pooled one, C latent channels, h w latent size.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo
from onestill.engine import Drawn, Job, TorchOptions, first_latents
from onestill.engine.compiling import compiled, prepared, save_compiled
from onestill.engine.memory import memory_told
from onestill.engine.networks import Networks, to_uint8
from onestill.engine.torch import TorchEngine
from onestill.errors import NotFiniteError
from onestill.sampling import classifier_free_guidance, sample

__all__ = ["BATCHES", "FastEngine"]

BATCHES = (1, 2, 4, 8)  # images to a call; others are filled up
PROMPTS_KEPT = 256  # whose states stay on the device; SDXL's take 0.3 MB each
MOST_BUCKETS = 16  # whose graphs are kept; each holds the memory of one call
WARM_UPS = 3  # calls before a capture, in which libraries choose and prepare their kernels

Words = tuple[torch.Tensor, torch.Tensor | None]  # states [B, K, D], pooled [B, P]


class FastEngine(TorchEngine):
    """A model on torch, words to pixels without leaving the device. See `onestill.engine.Engine` and `Job`.

    Any number of threads may call it; they take turns.

    Args:
        info: the model.
        options: how to compute.
        device: as `onestill.engine.device.choose` takes it; None and "auto" are a GPU where torch has one.
        dtype: one of `onestill.engine.weights.DTYPES`; None is float32 on a CPU and float16 elsewhere.
        threads: how many CPU threads torch uses, in the whole process; None leaves them as they are.

    Raises:
        OnestillError: an option cannot be had here; the sentence says which.
        CheckpointError: the weights do not fit the configs, or are of a class that is not supported.
        NotEnoughMemoryError: the weights do not fit into memory.
    """

    def __init__(
        self,
        info: ModelInfo,
        options: TorchOptions,
        *,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
    ) -> None:
        if dtype is None and options.quantize == "fp8":
            dtype = "bfloat16"  # all that torchao's fp8 with a scale for each row takes
        super().__init__(info, device=device, dtype=dtype, threads=threads)
        self.options = options
        on_gpu = self._device.type == "cuda"
        prepared(self._networks, options, on_gpu=on_gpu)
        self._call = compiled(self._networks, options, info, self.dtype)
        self._lock = threading.RLock()  # one call at a time: graphs share their memory
        self._graphs = Graphs(self._device) if options.graphs and on_gpu else None
        self._states: OrderedDict[str, tuple[torch.Tensor, torch.Tensor | None, int, str]] = OrderedDict()
        self._encoders: dict[int, Callable[..., Any]] = {}
        self._buckets: OrderedDict[tuple[Any, ...], Bucket] = OrderedDict()

    def draw(self, job: Job) -> Drawn:
        """Words to pixels for B images.

        Raises:
            NotEnoughMemoryError: they do not fit; the engine works on for the next job.
            NotFiniteError: no picture came out.
        """
        found = []
        height, width = (side * self.info.vae_scale_factor for side in job.noise.shape[3:])
        doing = f"draw {len(job.prompts)} pictures of {width}x{height}"
        with self._lock, torch.inference_mode(), _current(self._device):
            try:
                with memory_told(self._device, doing):
                    for first in range(0, len(job.prompts), BATCHES[-1]):
                        found.append(self._draw(job, slice(first, first + BATCHES[-1])))
            except MemoryError:
                self._forget()
                raise
        return Drawn.joined(found)

    def _forget(self) -> None:
        """Give back what graphs hold. Their common memory is free only when the last of them is gone."""
        self._buckets.clear()
        self._encoders.clear()
        if self._graphs is not None:
            self._graphs = Graphs(self._device)
            torch.cuda.empty_cache()

    def _draw(self, job: Job, part: slice) -> Drawn:
        prompts = list(job.prompts[part])
        count = len(prompts)
        size = next(size for size in BATCHES if size >= count)
        rows = [min(i, count - 1) for i in range(size)]  # the last image again fills a bucket up
        clock = _Clock(self._device)
        words, cut = self._words([prompts[row] for row in rows])
        against = None
        if job.negatives is not None:
            negatives = list(job.negatives[part])
            against = self._against([negatives[row] for row in rows])
        clock.tick()
        bucket = self._bucket(job, size, against is not None)
        time_ids = None if job.time_ids is None else job.time_ids[part][rows]
        latents = bucket.draw(job.noise[:, part][:, rows], job.start, words, against, time_ids)
        clock.tick()
        pictures = self._pictures(bucket, latents, count)
        spent = clock.stop()
        if not bucket.was_saved:
            bucket.was_saved = True
            save_compiled(self._networks, self.options, self.info, self.dtype)
        return Drawn(pictures, tuple(one[0] for one in cut[:count]), tuple(one[1] for one in cut[:count]), *spent)

    def _pictures(self, bucket: Bucket, latents: torch.Tensor, count: int) -> NDArray[np.uint8]:
        pictures, is_whole = bucket.decode(latents)
        if bool(is_whole):
            found: NDArray[np.uint8] = pictures[:count].cpu().numpy()
            return found
        try:
            # Once more in the open, which says what happened and decodes in float32.
            checked: NDArray[np.uint8] = to_uint8(self._networks.checked_image(latents[:count])).cpu().numpy()
            return checked
        except FloatingPointError as error:
            raise NotFiniteError.of(str(error), self.dtype) from None

    # --- words ---

    def _words(self, prompts: Sequence[str]) -> tuple[Words, list[tuple[int, str]]]:
        """States of the prompts on the device, each encoded once and remembered, and what did not fit of each."""
        new = [text for text in dict.fromkeys(prompts) if text not in self._states]
        for first in range(0, len(new), BATCHES[-1]):
            self._remember(new[first : first + BATCHES[-1]])
        known = [self._states[text] for text in prompts]
        for text in prompts:
            self._states.move_to_end(text)
        while len(self._states) > max(PROMPTS_KEPT, len(prompts)):
            self._states.popitem(last=False)
        states = torch.stack([one[0] for one in known])
        pooled = torch.stack([one[1] for one in known]) if self.info.is_xl else None  # type: ignore[misc] # XL has them
        return (states, pooled), [one[2:] for one in known]

    def _remember(self, prompts: Sequence[str]) -> None:
        size = next(size for size in BATCHES if size >= len(prompts))
        tokens = [tokenize([*prompts, *[""] * (size - len(prompts))]) for tokenize in self._tokenizers]
        ids, mask = self._inputs(tokens, slice(None))
        states, pooled = self._encoder(size, ids, mask)(ids, mask)
        for i, text in enumerate(prompts):
            kept = None if pooled is None else pooled[i].clone()
            self._states[text] = (states[i].clone(), kept, tokens[0].cut[i], tokens[0].words_cut[i])

    def _encoder(self, size: int, ids: Sequence[torch.Tensor], mask: torch.Tensor | None) -> Callable[..., Any]:
        if self._graphs is None:
            return self._networks.states
        if size not in self._encoders:
            inputs = [one.clone() for one in ids], None if mask is None else mask.clone()
            run = self._graphs.captured(lambda: self._networks.states(*inputs))

            def replay(ids: Sequence[torch.Tensor], mask: torch.Tensor | None) -> Any:
                for static, new in zip([*inputs[0], inputs[1]], [*ids, mask], strict=True):
                    if static is not None and new is not None:
                        static.copy_(new)
                return run()

            self._encoders[size] = replay
        return self._encoders[size]

    def _against(self, negatives: Sequence[str | None]) -> Words:
        (states, pooled), _ = self._words([text or "" for text in negatives])
        if self.info.zero_negative and all(text is None for text in negatives):
            return torch.zeros_like(states), None if pooled is None else torch.zeros_like(pooled)
        return states, pooled

    # --- steps and decoding ---

    def _bucket(self, job: Job, size: int, is_guided: bool) -> Bucket:
        shape = (size, *job.noise.shape[2:])
        plan = Plan(
            shape, len(job.noise), job.start is not None, is_guided, job.sampler, job.timesteps, job.guidance_scale
        )
        key = tuple(vars(plan).values())
        if key not in self._buckets:
            self._buckets[key] = Bucket(self._networks, self._call, plan, self._graphs)
            while len(self._buckets) > MOST_BUCKETS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return self._buckets[key]


@dataclass(frozen=True)
class Plan:
    """What a graph is made for; nothing of it can change from one call to the next.

    Attributes:
        shape: [B, C, h, w].
        noises: N.
        has_start: whether the walk starts from an image.
        is_guided: whether guidance steers away from something.
        sampler, timesteps, guidance_scale: as in `Job`.
    """

    shape: tuple[int, ...]
    noises: int
    has_start: bool
    is_guided: bool
    sampler: str
    timesteps: tuple[int, ...]
    guidance_scale: float


class Graphs:
    """Captures CUDA graphs that share their memory and follow each other on a stream of their own device.

    The stream is given because torch's default one is the first GPU's: what another GPU computes meanwhile would be
    captured by nobody, and the graph would replay nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A function without arguments as a graph: calling it runs the same kernels on the same memory."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may encode a picture meanwhile, which only they themselves must not do while capturing.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = function()

        def run() -> Any:
            graph.replay()
            return outputs

        return run


class Bucket:
    """The steps and the decoding of one plan, as graphs or as plain calls.

    Args:
        networks: the model.
        call: the UNet, compiled or not, as `Networks.output`.
        plan: what is fixed.
        graphs: what captures them; None for plain calls.
    """

    def __init__(
        self, networks: Networks, call: Callable[..., torch.Tensor], plan: Plan, graphs: Graphs | None
    ) -> None:
        self._networks, self._call, self._plan, self._graphs = networks, call, plan, graphs
        device = networks.device
        self._noise = torch.zeros((plan.noises, *plan.shape), device=device)
        self._start = torch.zeros((1, *plan.shape[1:]), device=device) if plan.has_start else None
        # float32 on the device: a network embeds timesteps of its own type, and a graph allows no copy from the host.
        self._timesteps = {t: torch.tensor(float(t), device=device) for t in plan.timesteps}
        self._words: list[torch.Tensor | None] = []
        self._decoded: torch.Tensor | None = None
        self._run_steps: Callable[[], torch.Tensor] | None = None
        self._run_decode: Callable[[], Any] | None = None
        self.was_saved = False  # what compiling it has left, for the next process

    def draw(
        self,
        noise: NDArray[np.float32],
        start: NDArray[np.float32] | None,
        words: Words,
        against: Words | None,
        time_ids: NDArray[np.float32] | None,
    ) -> torch.Tensor:
        """Noise [N, B, C, h, w] -> latents [B, C, h, w], which the next call overwrites."""
        self._noise.copy_(_pinned(noise, self._noise.device), non_blocking=True)
        if self._start is not None and start is not None:
            self._start.copy_(_pinned(start, self._start.device), non_blocking=True)
        dtype, device = self._networks.dtype, self._networks.device
        ids = None if time_ids is None else torch.from_numpy(np.ascontiguousarray(time_ids)).to(device)
        told = [*words, ids] if against is None else [*map(_both, words, against), _both(ids, ids)]
        # Sizes in pixels stay in float32: to bfloat16, 999 is 1000.
        told = [None if one is None else one.to(dtype) for one in told[:2]] + told[2:]
        if self._graphs is None:
            return self.latents(*told)
        if self._run_steps is None:
            self._words = [None if one is None else one.clone() for one in told]
            self._run_steps = self._graphs.captured(lambda: self.latents(*self._words))
        for static, new in zip(self._words, told, strict=True):
            if static is not None and new is not None:
                static.copy_(new)
        return self._run_steps()

    def latents(
        self, states: torch.Tensor | None, pooled: torch.Tensor | None, time_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """The whole walk; of words [B, K, D], or [2B, K, D] with what guidance steers away from behind."""
        plan, info = self._plan, self._networks.info
        draws = iter(self._noise)
        x = first_latents(info, plan.timesteps[0], next(draws), self._start)

        def predict_x0(x: torch.Tensor, timestep: int) -> torch.Tensor:
            given = torch.cat([x, x]) if plan.is_guided else x
            given = given.to(self._networks.dtype)
            output = self._call(given, self._timesteps[timestep], states, pooled, time_ids, plan.guidance_scale).float()
            if plan.is_guided:
                cond, uncond = output.chunk(2)
                output = classifier_free_guidance(cond, uncond, plan.guidance_scale)
            found: torch.Tensor = info.schedule.x0(output, x, timestep)
            return found

        found: torch.Tensor = sample(
            plan.sampler, predict_x0, x, info.schedule, plan.timesteps, lambda step: next(draws)
        )
        return found

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, C, h, w] -> pictures uint8 [B, H, W, 3], and whether every number was finite."""
        if self._graphs is None:
            return self.pictures(latents)
        if self._run_decode is None:
            self._decoded = latents.clone()
            static = self._decoded
            self._run_decode = self._graphs.captured(lambda: self.pictures(static))
        if self._decoded is not None:
            self._decoded.copy_(latents)
        found: tuple[torch.Tensor, torch.Tensor] = self._run_decode()
        return found

    def pictures(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `decode`, in plain calls."""
        image = self._networks.image(latents)
        return to_uint8(image), torch.isfinite(image).all() & torch.isfinite(latents).all()


def _both(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _pinned(array: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Streams, events and graphs belong to the GPU that is current, which is the first one unless told."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Clock:
    """Milliseconds between ticks; on a GPU by its own events, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []
        self.tick()

    def tick(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def stop(self) -> list[float]:
        """The milliseconds between all ticks, this one included."""
        self.tick()
        if self._on_gpu:
            self._marks[-1].synchronize()
            return [first.elapsed_time(second) for first, second in zip(self._marks, self._marks[1:], strict=False)]
        return [1000 * (second - first) for first, second in zip(self._marks, self._marks[1:], strict=False)]
