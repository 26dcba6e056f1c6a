from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from onestill.engine.protocol import Engine
from onestill.pipeline import Pipeline, load
from tests.serve.client import Served, serving

if TYPE_CHECKING:
    from onestill.serve.access.ledger import Ledger


class Gated:
    """A real engine whose network waits at a gate and fails on demand, so that tests know what runs when."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Semaphore(0)  # released at every call of the network
        self.batches: list[int] = []
        self.prompts: list[str] = []
        self.fail: Callable[[int], Exception | None] = lambda batch: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def encode(self, prompts: Any) -> Any:
        self.prompts += prompts
        return self._engine.encode(prompts)

    def denoise(self, latents: Any, timestep: int, conditioning: Any) -> Any:
        self.batches.append(len(latents))
        self.reached.release()
        assert self.gate.wait(20)
        error = self.fail(len(latents))
        if error is not None:
            raise error
        return self._engine.denoise(latents, timestep, conditioning)

    def hold(self) -> None:
        """Stop the network at its next call."""
        self.gate.clear()

    def wait_reached(self) -> None:
        """Wait for a call of the network."""
        assert self.reached.acquire(timeout=20)


@pytest.fixture(scope="session")
def tiny_pipe(tiny_folder: Path) -> Pipeline:
    return load(tiny_folder, threads=1)


@pytest.fixture
def gated(tiny_pipe: Pipeline) -> Iterator[Gated]:
    engine = Gated(tiny_pipe.engine)
    yield engine
    engine.gate.set()


@pytest.fixture(scope="module")
def served(tiny_pipe: Pipeline) -> Iterator[Served]:
    """A server with no limits on who may ask, shared by the tests of a module."""
    with serving(tiny_pipe) as running:
        yield running


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database of its own for each test."""
    return f"sqlite:///{tmp_path / 'serve.db'}"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    from onestill.serve.access.ledger import Ledger  # which needs the extra [access]

    found = Ledger(url)
    yield found
    found.close()
