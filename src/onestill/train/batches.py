"""From samples to batches: any resumable reader of samples becomes an endless, prefetched source of tensors."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from onestill.errors import DataError
from onestill.networks.condition import Condition, native_sizes
from onestill.pixels import to_images
from onestill.train.noise import Part
from onestill.train.runtime import parallel

Collate = Callable[[Sequence[Any]], dict[str, Any]]


class Reader(Protocol):
    """An endless iterator of samples that can say and take back where it stands."""

    def __iter__(self) -> Iterator[Any]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


class SampleBatches:
    """Batches of `batch_size` samples, collated, read `prefetch` batches ahead by a thread.

    The state travels with each batch, so that what a checkpoint keeps is where the *trained* batches end, not where
    the reader's thread has run ahead to. `pin` puts them into memory that a GPU can copy from while others compute.
    """

    def __init__(
        self, reader: Reader, collate: Collate, batch_size: int, prefetch: int = 4, *, pin: bool = False
    ) -> None:
        self._reader, self._collate, self._batch_size = reader, collate, batch_size
        self._prefetch, self._pin = prefetch, pin
        self._state = reader.state()
        self._queue: queue.Queue[tuple[Any, dict[str, Any]]] | None = None
        self._samples: Iterator[Any] | None = None

    def next(self) -> dict[str, Any]:
        if self._prefetch == 0:
            self._samples = self._samples or iter(self._reader)  # one for all batches: it may have read ahead
            batch, self._state = self._read(self._samples)
            return batch
        if self._queue is None:
            self._queue = queue.Queue(self._prefetch)
            threading.Thread(target=self._run, args=(self._queue,), daemon=True, name="batches").start()
        batch, state = self._queue.get()
        if isinstance(batch, BaseException):
            self._queue = None
            raise batch
        self._state = state
        return dict(batch)

    def state(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to `state`; only before the first `next`."""
        if self._queue is not None:
            raise RuntimeError("load_state after reading began")
        self._reader.load_state(state)
        self._state = dict(state)

    def _read(self, samples: Iterator[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        batch = [next(samples) for _ in range(self._batch_size)]
        made = self._collate(batch)
        if self._pin:
            made = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in made.items()}
        return made, self._reader.state()

    def _run(self, into: queue.Queue[tuple[Any, dict[str, Any]]]) -> None:
        try:
            samples = iter(self._reader)
            while True:
                into.put(self._read(samples))
        except BaseException as error:  # handed to the trainer, which raises it
            into.put((error, {}))


def collate_images(samples: Sequence[Any]) -> dict[str, Any]:
    """Samples with `.image` uint8 [H, W, 3] and `.caption` -> images [B, 3, H, W] in [-1, 1], captions."""
    sizes = {np.shape(sample.image)[:2] for sample in samples}
    if len(sizes) > 1 or (0, 0) in sizes:
        raise DataError(
            f"pictures of {sorted(sizes)} px make no batch: use shards of one size, with data.images = true."
        )
    # NumPy and not torch: a torch operation in the reading thread would start a second team of threads, which then
    # fights the training's for the cores (measured on two cores: 48 images a second instead of 60).
    images = to_images(np.stack([np.asarray(sample.image) for sample in samples]))
    return {"images": torch.from_numpy(images), "captions": [sample.caption for sample in samples]}


def collate_latents(samples: Sequence[Any]) -> dict[str, Any]:
    """Samples with `.arrays` latents float16 [C, h, w], text float16 [K, D] and mask bool [K] -> tensors, captions.

    For models of two text encoders, pooled [P] and sizes [6] as well.
    Where the reader decoded the pictures too, `images` [B, 3, H, W] in [-1, 1] are among them.
    """
    pictures = collate_images(samples) if samples[0].image.size else {}
    for name in ("latents", "text", "mask"):
        if any(name not in sample.arrays for sample in samples):
            raise DataError(
                f"the shards hold no '{name}': train on those that `onestill data cache` or "
                "`python -m recipes.icons.cache` writes."
            )
    stacked = {name: np.stack([sample.arrays[name] for sample in samples]) for name in ("latents", "text", "mask")}
    return pictures | {
        "latents": torch.from_numpy(stacked["latents"].astype(np.float32)),  # [B, C, h, w]
        "text": torch.from_numpy(stacked["text"].astype(np.float32)),  # [B, K, D]
        "mask": torch.from_numpy(stacked["mask"].astype(np.bool_)),  # [B, K]
        "captions": [sample.caption for sample in samples],
        **_added(samples),
    }


def _added(samples: Sequence[Any]) -> dict[str, Tensor]:
    """What models of two text encoders take besides: pooled float32 [B, P], sizes float32 [B, 6]; or nothing."""
    there = [name for name in ("pooled", "sizes") if name in samples[0].arrays]
    if any(name not in sample.arrays for sample in samples for name in there):
        raise DataError("some shards hold 'pooled' and others do not: they were cached for different models.")
    stacked = {name: np.stack([sample.arrays[name] for sample in samples]) for name in there}
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in stacked.items()}


def batch_condition(batch: Mapping[str, Any], device: torch.device, native_px: int = 0) -> Condition:
    """The condition of a batch of cached samples; sizes default to an uncropped image of `native_px`."""
    pooled, sizes = batch.get("pooled"), batch.get("sizes")
    if pooled is not None and sizes is None:
        sizes = native_sizes(len(pooled), native_px)
    return Condition(batch["text"], batch["mask"], pooled, sizes).to(device)


COLLATE: dict[str, Collate] = {"images": collate_images, "latents": collate_latents}


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device; nobody waits for copies from pinned memory."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def captions_before(
    batch: Mapping[str, Any], text: Tensor, part: Part, embed: Callable[[dict[str, Any]], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The caption of the sample before, for each sample of a pass, in the order of the whole batch.

    Args:
        batch: the pass's; its "whole" is the process's batch where that takes several passes.
        text: [B, E], the embeddings of the pass's captions.
        part: which of the whole batch the pass is.
        embed: one row of a batch -> its caption's embedding, [1, E].

    Returns:
        The embeddings [B, E]; bool [B], where the two captions differ; and how many differ in the whole batch, as this
        pass's share, at least one.
    """
    whole, ahead = batch.get("whole", batch), text[-1:]
    if whole is not batch:  # what stands before this pass is the last of the one before
        ahead = embed({key: value[part.index * len(text) - 1 :][:1] for key, value in whole.items()})
    every = parallel.stacked(torch.cat([ahead, text]))  # [processes, 1 + B, E]
    before = every[part.rank - 1][1:] if part.rank else every[-1][:-1]
    numbers = torch.tensor([_number(caption) for caption in whole["captions"]]).to(text.device, non_blocking=True)
    numbers = parallel.stacked(numbers).T.flatten()  # in the order of the whole batch
    differ = numbers != numbers.roll(1)
    return before, part.of(differ, len(text)), differ.sum().clamp(min=1) / part.parts


def _number(caption: str) -> int:
    """The same for equal captions, and in every process."""
    digest = hashlib.blake2b(caption.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
