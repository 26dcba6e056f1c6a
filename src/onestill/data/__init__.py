"""Image-text data: shards, the reader with resumable order, the small sample set."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onestill.data.shards import (
        ReaderState,
        Sample,
        ShardReader,
        ShardWriter,
        find_shards,
        sample_shards,
    )

__all__ = ["ReaderState", "Sample", "ShardReader", "ShardWriter", "find_shards", "sample_shards"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("onestill.data.shards"), name)  # late, as it imports NumPy and Pillow
