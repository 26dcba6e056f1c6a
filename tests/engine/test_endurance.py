"""Many requests, and one too large: memory does not grow, and an engine that ran out of it works on."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onestill.engine.memory import parameters
from onestill.engine.protocol import TorchOptions
from onestill.errors import NotEnoughMemoryError
from onestill.pipeline import Pipeline
from tests.on_cpu import load
from tests.tiny_sd import tiny_sd

STATM = Path("/proc/self/statm")
MOST_GROWTH = 16 * 2**20  # bytes over 500 requests; leaking one tiny picture's latents each would be 8 MB, states 20
linux_only = pytest.mark.skipif(not STATM.is_file(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl")


def engines(folder: Path) -> list[Pipeline]:
    return [load(folder, engine="torch"), load(folder, engine="torch", options=TorchOptions())]


def bytes_used(column: int) -> int:
    return int(STATM.read_text().split()[column]) * resource.getpagesize()


@linux_only
@pytest.mark.slow
def test_memory_does_not_grow_over_500_requests(xl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.engine.prompt_cache.MOST_PROMPTS", 16)
    for pipe in engines(xl):
        for i in range(60):
            pipe(f"a red apple {i}", seed=i)
        gc.collect()
        before = bytes_used(1)
        for i in range(500):
            pipe(f"a green heart {i}", seed=i)
        gc.collect()
        assert bytes_used(1) - before < MOST_GROWTH


@contextmanager
def little_memory_left(spare: int) -> Iterator[None]:
    """Allow this process `spare` bytes more than it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (bytes_used(0) + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@linux_only
def test_a_request_that_does_not_fit_leaves_the_engine_working(xl: Path) -> None:
    for pipe in engines(xl):
        expected = np.asarray(pipe("a red apple", seed=1).images[0])
        with (
            little_memory_left(150 * 2**20),
            pytest.raises(NotEnoughMemoryError, match="draw fewer or smaller") as caught,
        ):
            pipe("a red apple", seed=1, height=2048, width=2048)
        assert "1 pictures of 2048x2048" in str(caught.value)
        np.testing.assert_array_equal(np.asarray(pipe("a red apple", seed=1).images[0]), expected)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(xl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info: Any = load(xl, engine="torch").info
    count = parameters(info)
    assert count > 10**6
    monkeypatch.setattr("onestill.engine.memory._available", lambda: 3 * count)
    with pytest.raises(NotEnoughMemoryError, match="load it with dtype 'bfloat16'"):
        load(xl, engine="torch")
    assert load(xl, engine="torch", dtype="bfloat16").engine.dtype == "bfloat16"
    monkeypatch.setattr("onestill.engine.memory._available", lambda: count)
    with pytest.raises(NotEnoughMemoryError, match="int8"):
        load(xl, engine="torch")
