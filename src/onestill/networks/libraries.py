"""diffusers and transformers without their advice and progress bars. Needs `[torch]`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers

__all__ = ["quiet_libraries"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Run the body without the advice and progress bars of diffusers and transformers. Their errors still raise."""
    loggings = (diffusers.utils.logging, transformers.utils.logging)
    before = [(one.get_verbosity(), one.is_progress_bar_enabled()) for one in loggings]
    try:
        for one in loggings:
            one.set_verbosity_error()
            one.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, (verbosity, bars) in zip(loggings, before, strict=True):
            one.set_verbosity(verbosity)
            if bars:
                one.enable_progress_bar()
