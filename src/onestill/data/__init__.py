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

_WHERE = {
    "ReaderState": "onestill.data.shards",
    "Sample": "onestill.data.shards",
    "ShardReader": "onestill.data.shards",
    "ShardWriter": "onestill.data.shards",
    "find_shards": "onestill.data.shards",
    "sample_shards": "onestill.data.shards",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
