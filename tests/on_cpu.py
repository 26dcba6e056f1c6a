"""`load` and `load_engine` on the CPU, for tests whose numbers must not depend on whether the machine has a GPU."""

from __future__ import annotations

from functools import partial

from onestill import engine, pipeline

load = partial(pipeline.load, device="cpu")
load_engine = partial(engine.load_engine, device="cpu")
