from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from onestill.errors import DataError
from onestill.pixels import to_pictures
from onestill.train.batches import SampleBatches, batch_condition, collate_images, collate_latents


class Counter:
    """Counts on from where it stands; fails at `fails`."""

    def __init__(self, fails: int = -1) -> None:
        self.position, self.fails, self.starts = 0, fails, 0

    def __iter__(self) -> Iterator[int]:
        self.starts += 1
        while True:
            if self.position == self.fails:
                raise DataError("the shard is gone")
            self.position += 1
            yield self.position - 1

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def new(reader: Counter, prefetch: int) -> SampleBatches:
    return SampleBatches(reader, lambda samples: {"numbers": list(samples)}, 3, prefetch)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_reader_is_started_once(prefetch: int) -> None:
    reader = Counter()  # of shards, a start is new processes and what they read ahead
    batches = new(reader, prefetch)
    assert [batches.next()["numbers"] for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert reader.starts == 1


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_the_state_is_where_the_taken_batches_end(prefetch: int) -> None:
    batches = new(Counter(), prefetch)
    assert batches.state() == {"position": 0}
    assert [batches.next()["numbers"] for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert batches.state() == {"position": 9}
    again = new(Counter(), prefetch)
    again.load_state(batches.state())
    assert again.next() == batches.next() == {"numbers": [9, 10, 11]}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_readers_error_is_raised_where_it_matters(prefetch: int) -> None:
    batches = new(Counter(fails=5), prefetch)
    assert batches.next()["numbers"] == [0, 1, 2]
    with pytest.raises(DataError, match="the shard is gone"):
        batches.next()
    assert batches.state() == {"position": 3}


def test_it_cannot_jump_while_it_reads() -> None:
    batches = new(Counter(), 2)
    batches.next()
    with pytest.raises(RuntimeError, match="after reading began"):
        batches.load_state({"position": 0})


def sample(size: int = 2, **arrays: Any) -> Any:
    return SimpleNamespace(image=np.full((size, size, 3), 255, np.uint8), caption="a star", arrays=arrays)


def cached(size: int = 2) -> Any:
    text, mask = np.ones((4, 5), np.float16), np.array([1, 1, 0, 0], bool)
    return sample(size, latents=np.ones((2, 3, 3), np.float16), text=text, mask=mask)


def test_pictures_become_images_and_back() -> None:
    batch = collate_images([sample(), sample()])
    assert batch["images"].shape == (2, 3, 2, 2)
    assert batch["images"].unique().tolist() == [1.0]
    assert batch["captions"] == ["a star"] * 2
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    made = collate_images([SimpleNamespace(image=levels[0], caption="")])["images"]
    assert (to_pictures(made.numpy()) == levels).all()


def test_cached_arrays_become_float32() -> None:
    batch = collate_latents([cached(), cached()])
    assert {name: value.dtype for name, value in batch.items() if name != "captions"} == {
        "images": torch.float32,
        "latents": torch.float32,
        "text": torch.float32,
        "mask": torch.bool,
    }
    assert "images" not in collate_latents([cached(size=0)])


def test_samples_that_make_no_batch() -> None:
    with pytest.raises(DataError, match="one size"):
        collate_images([sample(2), sample(3)])
    with pytest.raises(DataError, match=r"data\.images = true"):
        collate_images([sample(0)])
    with pytest.raises(DataError, match="hold no 'latents'"):
        collate_latents([cached(), sample()])


def test_a_batch_without_sizes_is_of_whole_pictures() -> None:
    batch = {"text": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3), "pooled": torch.zeros(2, 5)}
    told = batch_condition(batch, torch.device("cpu"), 512)
    assert told.sizes is not None
    assert told.sizes.tolist() == [[512, 512, 0, 0, 512, 512]] * 2
