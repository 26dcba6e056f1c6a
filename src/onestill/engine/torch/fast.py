"""The fast engine on torch: prompts to pictures in three calls, each a CUDA graph on a GPU. `[torch]`

The three calls are the functions of `onestill.engine.torch.stages`. Without a GPU they run as they are, which is how
they are tested against `onestill.engine.torch.eager`. On a GPU `onestill.engine.torch.cuda_graphs` makes graphs of
them, one for each batch size (1, 2, 4 or 8), image size and number of steps.

Shapes: B images, K tokens, D width of a token's state, P of a pooled prompt, C latent channels, h w latent size.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onestill.checkpoint import ModelInfo
from onestill.engine.memory import explain_oom
from onestill.engine.prompt_cache import PromptCache
from onestill.engine.protocol import GenerationRequest, GenerationResult, TorchOptions
from onestill.engine.torch.compiling import compiled, prepared, run_as_asked, save_compiled
from onestill.engine.torch.cuda_graphs import Buckets, Graphs, Recorder
from onestill.engine.torch.eager import TorchEngine
from onestill.engine.torch.stages import decode_latents, encode_prompts, take_steps
from onestill.engine.torch.step_table import step_table

BATCHES = (1, 2, 4, 8)  # images to a call; other numbers are padded to the next, as each size is a graph of its own
TABLES_CACHED = 64  # step tables


class _Encoded(NamedTuple):
    """A prompt's states [K, D] and pooled [P] on the device, and what did not fit of it."""

    states: Tensor
    pooled: Tensor | None
    tokens_cut: int
    words_cut: str


class FastEngine(TorchEngine):
    """A model on torch, prompts to pictures without leaving the device. See `onestill.engine.protocol.EndToEndEngine`.

    Any number of threads may call it; one at a time is served.

    Args:
        info, device, dtype, threads: as `TorchEngine` takes them.
        options: how to compute.
        recorder: what makes graphs; None is CUDA where it is there and `options.graphs` asks for it.

    Raises:
        OnestillError: as `TorchEngine`, or an option cannot be had here; the sentence says which.
    """

    def __init__(
        self,
        info: ModelInfo,
        options: TorchOptions,
        *,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        if dtype is None and options.quantize == "fp8":
            dtype = "bfloat16"  # the only type that torchao's fp8 with a scale for each row accepts
        super().__init__(info, device=device, dtype=dtype, threads=threads)
        self.options = options
        # With its number: "cuda" alone is whatever GPU is current in the thread that asks.
        self._device = self._networks.device
        on_gpu = self._device.type == "cuda"
        prepared(self._networks, options, on_gpu=on_gpu)
        call = compiled(self._networks, options, info, self.dtype)
        self._lock = RLock()  # one call at a time: graphs share their memory
        self._prompts = PromptCache(self._encode_new)
        self._table = lru_cache(TABLES_CACHED)(self._new_table)
        if recorder is None and options.graphs and on_gpu:
            recorder = Graphs(self._device)
        self._recorder = recorder

        def buckets(function: Any, *first: Any) -> Buckets:
            return Buckets(run_as_asked(partial(function, *first), options), self._device, recorder)

        self._encoder = buckets(encode_prompts, self._networks)
        self._sampler = buckets(take_steps, self._networks, call)
        self._decoder = buckets(decode_latents, self._networks)
        self._saved = 0  # first uses when what compiling has left was last written

    def warm_ups(self, most: int) -> tuple[int, ...]:
        """See `onestill.engine.protocol.Engine`; twice each, where the second time records a graph."""
        sizes = super().warm_ups(most)
        return sizes if self._recorder is None else tuple(size for size in sizes for _ in range(2))

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """See `onestill.engine.protocol.EndToEndEngine`."""
        found = []
        with self._lock, torch.inference_mode(), _current(self._device):
            try:
                with explain_oom(self._device, self._drawing(request.noise[0])):
                    for first in range(0, len(request.prompts), BATCHES[-1]):
                        found.append(self._generate(request, slice(first, first + BATCHES[-1])))
            except MemoryError:
                self._forget()
                raise
            self._save_compiled()
        return GenerationResult.joined(found)

    def _forget(self) -> None:
        """Give back what graphs hold. Their common memory is free only when the last of them is gone."""
        for buckets in (self._encoder, self._sampler, self._decoder):
            buckets.forget()
        if self._recorder is not None:
            self._recorder.reset()

    def _save_compiled(self) -> None:
        uses = self._sampler.first_uses + self._decoder.first_uses
        if uses > self._saved:
            self._saved = uses
            save_compiled(self._networks, self.options, self.info, self.dtype)

    def _generate(self, request: GenerationRequest, part: slice) -> GenerationResult:
        prompts = list(request.prompts[part])
        count = len(prompts)
        size = next(size for size in BATCHES if size >= count)
        rows = [min(i, count - 1) for i in range(size)]  # the last image again pads the batch
        clock = _Clock(self._device)
        encoded = self._prompts([prompts[row] for row in rows])
        states, pooled = _stacked(encoded)
        if request.negatives is not None:
            negatives = self._negative([request.negatives[part][row] for row in rows])
            states, pooled = torch.cat([states, negatives[0]]), _both(pooled, negatives[1])
        time_ids = None if request.time_ids is None else torch.from_numpy(request.time_ids[part][rows])
        clock.tick()
        has_start = request.start is not None
        latents: Tensor = self._sampler(
            self._table(request.sampler, request.timesteps, len(request.noise), has_start),
            torch.tensor(request.guidance_scale, dtype=torch.float32),
            _tensor(request.noise[:, part][:, rows]),
            None if request.start is None else _tensor(request.start),
            states,
            pooled,
            time_ids if request.negatives is None else _both(time_ids, time_ids),
            None if request.mask is None else _tensor(request.mask),
        ).clone()  # the decoder's graph may use the same memory
        clock.tick()
        pictures = self._pictures(latents, count)
        spent = clock.stop()
        tokens_cut, words_cut = zip(*((one.tokens_cut, one.words_cut) for one in encoded[:count]), strict=True)
        return GenerationResult(pictures, tokens_cut, words_cut, *spent)

    def _new_table(self, sampler: str, timesteps: tuple[int, ...], noises: int, has_start: bool) -> Tensor:
        return torch.from_numpy(step_table(self.info, sampler, timesteps, noises, has_start)).to(self._device)

    def _pictures(self, latents: Tensor, count: int) -> NDArray[np.uint8]:
        pictures, is_finite = self._decoder(latents)
        if bool(is_finite):
            found: NDArray[np.uint8] = pictures[:count].cpu().numpy()
            return found
        # Decode again, eagerly and in float32: either that succeeds, or the error names what overflowed.
        return self._checked_pictures(latents[:count])

    # --- prompts ---

    def _encode_new(self, prompts: list[str]) -> list[_Encoded]:
        parts = [prompts[first : first + BATCHES[-1]] for first in range(0, len(prompts), BATCHES[-1])]
        return [one for part in parts for one in self._encode_batch(part)]

    def _encode_batch(self, prompts: Sequence[str]) -> Iterator[_Encoded]:
        size = next(size for size in BATCHES if size >= len(prompts))
        tokens = self._networks.text_encoder.tokenize([*prompts, *[""] * (size - len(prompts))])
        ids = [torch.from_numpy(one.ids) for one in tokens]
        mask = torch.from_numpy(tokens[0].mask) if self.info.use_attention_mask else None
        states, pooled = self._encoder(ids[0], ids[1] if len(ids) > 1 else None, mask)
        for i in range(len(prompts)):
            own = None if pooled is None else pooled[i].clone()
            yield _Encoded(states[i].clone(), own, tokens[0].cut[i], tokens[0].words_cut[i])

    def _negative(self, negatives: Sequence[str | None]) -> tuple[Tensor, Tensor | None]:
        """The states [B, K, D] and pooled [B, P] of what guidance steers away from."""
        states, pooled = _stacked(self._prompts([text or "" for text in negatives]))
        if self.info.zero_negative and all(text is None for text in negatives):
            return torch.zeros_like(states), None if pooled is None else torch.zeros_like(pooled)
        return states, pooled


def _stacked(encoded: Sequence[_Encoded]) -> tuple[Tensor, Tensor | None]:
    pooled = [one.pooled for one in encoded if one.pooled is not None]
    return torch.stack([one.states for one in encoded]), torch.stack(pooled) if pooled else None


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _tensor(array: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Streams, events and graphs belong to the GPU that is current, which is the first one unless said."""
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
