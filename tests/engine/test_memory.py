"""What is said, and given back, when memory runs out."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from onestill.engine.memory import memory_told
from onestill.errors import NotEnoughMemoryError


def test_what_did_not_fit_is_given_back_while_the_error_is_handled() -> None:
    kept: list[weakref.ref[Any]] = []

    def draw() -> None:
        large = np.zeros(1000)
        kept.append(weakref.ref(large))
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(NotEnoughMemoryError, match="to draw; draw fewer") as caught, memory_told("cpu", "draw"):
        draw()
    assert caught.value.__context__ is not None  # whose frames are alive, with nothing in them
    assert kept[0]() is None


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_told("cpu", "draw"):
        raise RuntimeError("shapes differ")
