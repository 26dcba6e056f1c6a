"""diffusers and transformers without their advice and progress bars. Needs `[torch]`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import transformers

__all__ = ["open_whole", "quiet_libraries"]


def open_whole(kind: Any, folder: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained` of a local folder, where every weight is there.

    Raises:
        ValueError: some are missing or of another shape, which the libraries make up at random and only warn of.
    """
    if kind is transformers.BertModel:  # of which only the tokens' states are used, and some files have no pooler
        options["add_pooling_layer"] = False
    model, report = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    if wanting := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise ValueError(f"{len(wanting)} of its weights are missing, such as {sorted(map(str, wanting))[0]}")
    return model


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
