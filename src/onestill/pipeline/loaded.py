"""What a loaded model is, and what runs it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Self

from onestill.checkpoint import ModelInfo
from onestill.engine.protocol import Engine


@dataclass(frozen=True)
class LoadedInfo(ModelInfo):
    """What a loaded model is: all of `ModelInfo`, and how it runs.

    Attributes:
        engine: what runs it, one of `onestill.engine.ENGINES`.
        device: where: "cpu", "cuda", "mps", ...
        dtype: what it computes in: "float32", "bfloat16", "float16" or "int8".
    """

    _: KW_ONLY
    engine: str
    device: str
    dtype: str

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """That of an engine's model."""
        model = {field.name: getattr(engine.info, field.name) for field in fields(ModelInfo)}
        return cls(**model, engine=engine.name, device=engine.device, dtype=engine.dtype)
