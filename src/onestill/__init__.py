"""One step, one still: pictures from prompts in a single diffusion step.

    import onestill

    pipe = onestill.load()
    pipe("a red apple, fluent 3d emoji", seed=1).images[0].save("apple.png")

The public names load on first use, so that `import onestill` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onestill.checkpoint import ModelInfo, list_models, model_path
    from onestill.errors import (
        CheckpointError,
        DataError,
        ImageError,
        MissingExtraError,
        ModelNotFoundError,
        NotEnoughMemoryError,
        NotFiniteError,
        OnestillError,
        OutputError,
        PromptError,
        RecipeError,
        ScheduleError,
        SizeError,
        StepsError,
        UnsafeFormatError,
    )
    from onestill.pipeline import Output, Pipeline, Timings, load

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DataError",
    "ImageError",
    "MissingExtraError",
    "ModelInfo",
    "ModelNotFoundError",
    "NotEnoughMemoryError",
    "NotFiniteError",
    "OnestillError",
    "Output",
    "OutputError",
    "Pipeline",
    "PromptError",
    "RecipeError",
    "ScheduleError",
    "SizeError",
    "StepsError",
    "Timings",
    "UnsafeFormatError",
    "__version__",
    "list_models",
    "load",
    "model_path",
]

_HOME = {name: "onestill.errors" for name in __all__ if name.endswith("Error")} | {
    "ModelInfo": "onestill.checkpoint",
    "Output": "onestill.pipeline",
    "Pipeline": "onestill.pipeline",
    "Timings": "onestill.pipeline",
    "list_models": "onestill.checkpoint",
    "load": "onestill.pipeline",
    "model_path": "onestill.checkpoint",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'onestill' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # so that the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return __all__
