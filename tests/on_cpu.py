"""`load` and `load_engine` on the CPU, for tests whose numbers must not depend on whether the machine has a GPU.

And a mark for tests of what some CPUs lack.
"""

from __future__ import annotations

from functools import partial

import pytest

from onestill import engine, pipeline
from onestill.engine.openvino.cpu import lacks_vnni

load = partial(pipeline.load, device="cpu")
load_engine = partial(engine.load_engine, device="cpu")
needs_vnni = pytest.mark.skipif(lacks_vnni(), reason="this CPU has no VNNI, and int8 is refused")
