"""When graphs are recorded, what shares one, and what they give; on a CPU by graphs that behave as CUDA's do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from onestill.checkpoint import describe
from onestill.engine.protocol import TorchOptions
from onestill.engine.torch.cuda_graphs import MOST_GRAPHS, Buckets, Recorder
from onestill.engine.torch.fast import FastEngine
from onestill.errors import NotEnoughMemoryError
from onestill.pipeline import Pipeline
from onestill.serve.queue.warm_up import warm_up
from tests.engine.replays import Replays
from tests.on_cpu import load
from tests.tiny_sd import tiny_sd

CPU = torch.device("cpu")
OUT_OF_MEMORY = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def doubled(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return 2 * x, y


def numbers(*shape: int) -> Tensor:
    return torch.rand(shape)


# --- one function ---


def test_the_first_use_of_shapes_runs_as_it_is_and_the_second_is_recorded() -> None:
    recorder = Replays()
    buckets = Buckets(doubled, CPU, recorder)
    for use, recordings in ((1, 0), (2, 1), (3, 1), (4, 1)):
        x, y = numbers(2, 3), numbers(1)
        found = buckets(x, y)
        torch.testing.assert_close(found[0], 2 * x)
        torch.testing.assert_close(found[1], y)
        assert (recorder.recordings, buckets.graphs) == (recordings, recordings), use
    for other in ((numbers(2, 4), numbers(1)), (numbers(2, 3), None), (numbers(2, 3).double(), numbers(1))):
        buckets(*other)
    assert recorder.recordings == 1
    assert buckets.first_uses == 4


def test_without_graphs_it_runs_as_it_is() -> None:
    buckets = Buckets(doubled, CPU, None)
    for _ in range(3):
        assert buckets(torch.ones(2), None)[0].tolist() == [2, 2]
    assert (buckets.graphs, buckets.first_uses) == (0, 1)


def test_what_is_asked_for_once_pushes_no_graph_out() -> None:
    recorder = Replays()
    buckets = Buckets(doubled, CPU, recorder)
    for _ in range(2):
        buckets(numbers(1), None)
    for length in range(2, 100):
        buckets(numbers(length), None)
    buckets(numbers(1), None)
    assert (recorder.recordings, buckets.graphs) == (1, 1)


def test_the_longest_unused_graph_goes_first() -> None:
    recorder = Replays()
    buckets = Buckets(doubled, CPU, recorder)
    for length in range(1, MOST_GRAPHS + 2):
        for _ in range(2):
            buckets(numbers(length), None)
        buckets(numbers(1), None)
    assert (recorder.recordings, buckets.graphs) == (MOST_GRAPHS + 1, MOST_GRAPHS)
    buckets(numbers(1), None)
    assert recorder.recordings == MOST_GRAPHS + 1
    x = numbers(2)  # whose graph went
    torch.testing.assert_close(buckets(x, None)[0], 2 * x)
    assert recorder.recordings == MOST_GRAPHS + 2


class Failing(Replays):
    """Fails within a recording with one error, and ends it with another, as torch does."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self._error = error

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.recordings += 1
        try:
            raise RuntimeError(self._error)
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_what_does_not_fit_as_a_graph_runs_without() -> None:
    recorder = Failing(OUT_OF_MEMORY)
    buckets = Buckets(doubled, CPU, recorder)
    for _ in range(4):
        x = numbers(3)
        torch.testing.assert_close(buckets(x, None)[0], 2 * x)
    assert (recorder.recordings, buckets.graphs) == (1, 0)


def test_other_failures_of_a_recording_are_told() -> None:
    buckets = Buckets(doubled, CPU, Failing("CUDA error: an illegal memory access was encountered"))
    buckets(numbers(3), None)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        buckets(numbers(3), None)


def test_a_process_records_one_graph_at_a_time() -> None:
    recording: list[int] = []
    most: list[int] = []

    class Slow(Recorder):
        def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
            recording.append(1)
            most.append(len(recording))
            time.sleep(0.05)
            recording.pop()
            return function

    def engine() -> None:
        buckets = Buckets(doubled, CPU, Slow())
        for _ in range(2):
            buckets(numbers(3), None)

    threads = [threading.Thread(target=engine) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


# --- an engine ---


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl")


class Graphed:
    def __init__(self, folder: Path) -> None:
        self.recorder = Replays()
        self.engine: Any = FastEngine(describe(folder), TorchOptions(), device="cpu", recorder=self.recorder)
        self.pipe = Pipeline(self.engine)

    @property
    def graphs(self) -> tuple[int, int, int]:
        """Of prompts, steps and decoding."""
        return self.engine._encoder.graphs, self.engine._walk.graphs, self.engine._decoder.graphs


@pytest.fixture(scope="module")
def graphed(xl: Path) -> Graphed:
    return Graphed(xl)


def levels(pipe: Pipeline, prompts: Any, **settings: Any) -> Any:
    return np.stack([np.asarray(image, dtype=np.int16) for image in pipe(prompts, seed=7, **settings).images])


def test_graphs_draw_what_the_slow_way_draws(xl: Path) -> None:
    graphed, slow = Graphed(xl), load(xl, engine="torch")
    image = PIL.Image.new("RGB", (64, 64), "orange")
    every = (
        {"num_inference_steps": 1},
        {"num_inference_steps": 3},
        {"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "a blue star"},
        {"num_inference_steps": 2, "image": image, "strength": 0.5},
        {"num_inference_steps": 1, "height": 72, "width": 80},
    )
    for turn in range(3):
        for number, settings in enumerate(every):
            prompts = [f"a red apple {turn}", f"a star {number}", "a heart"]
            found, expected = (levels(pipe, prompts, **settings) for pipe in (graphed.pipe, slow))
            assert np.abs(found - expected).max() <= 1, (turn, settings)
    assert graphed.graphs[1:] == (5, 2)  # a decoder's graph is one for a size, whatever the steps


def test_other_guidance_sampler_strength_and_timesteps_share_a_graph(graphed: Graphed, xl: Path) -> None:
    slow = load(xl, engine="torch")
    image = PIL.Image.new("RGB", (64, 64), "orange")
    apple = "a red apple"
    for kinds in (
        [{"num_inference_steps": 2, "guidance_scale": scale} for scale in (1.5, 2.0, 3.0, 7.5)],
        [{"num_inference_steps": 4, "sampler": sampler} for sampler in ("euler", "ddim", "dpmpp_2m", "euler")],
        [{"num_inference_steps": 3, "sampler": sampler} for sampler in ("consistency", "euler_ancestral") * 2],
        [{"num_inference_steps": 1, "image": image, "strength": strength} for strength in (0.2, 0.5, 0.7, 1.0)],
    ):
        before = graphed.engine._walk.graphs
        pictures = []
        for settings in kinds:
            pictures.append(levels(graphed.pipe, apple, **settings))
            assert np.abs(pictures[-1] - levels(slow, apple, **settings)).max() <= 1, settings
        assert graphed.engine._walk.graphs == before + 1, kinds
        assert len({picture.tobytes() for picture in pictures}) > 1, "they are other pictures"


def test_a_warm_up_leaves_graphs_for_every_call_that_a_scheduler_makes(xl: Path) -> None:
    graphed, said = Graphed(xl), []
    warm_up(graphed.pipe, 4, said.append)
    assert said == ["warming up: 1, 2, 4 at once, 64x64 px, num_inference_steps 1"]
    assert graphed.graphs == (3, 3, 3)
    recordings = graphed.recorder.recordings
    before = graphed.engine._walk.first_uses
    for count in (1, 2, 3, 4):
        graphed.pipe([f"a star {count} {i}" for i in range(count)], seed=1)
    assert graphed.recorder.recordings == recordings == 9
    assert graphed.engine._walk.first_uses == before


def test_an_overflow_is_decoded_again_from_latents_that_are_whole(xl: Path) -> None:
    graphed, slow = Graphed(xl), load(xl, engine="torch")
    for pipe in (graphed.pipe, slow):
        engine: Any = pipe.engine
        engine._networks.latent_space.decoder.to(torch.float16)
        engine._networks.latent_space.decoder.decoder.conv_in.weight *= 1e4
    pictures = []
    for pipe in (slow, graphed.pipe, graphed.pipe):  # the second time by graphs
        with pytest.warns(RuntimeWarning, match=r"decoded in float32"):
            pictures.append(levels(pipe, "a red apple"))
    assert max(np.abs(picture - pictures[0]).max() for picture in pictures) <= 1


def test_out_of_memory_gives_all_graphs_back_and_the_engine_works_on(xl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = Graphed(xl)
    expected = [levels(graphed.pipe, "a red apple") for _ in range(2)][1]
    assert graphed.graphs == (0, 1, 1)

    def image(latents: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(graphed.engine._networks.latent_space, "decode", image)
        with pytest.raises(NotEnoughMemoryError, match="draw 2 pictures of 64x64"):
            levels(graphed.pipe, ["a red apple", "a star"])
    assert graphed.graphs == (0, 0, 0)
    assert np.abs(levels(graphed.pipe, "a red apple") - expected).max() == 0
