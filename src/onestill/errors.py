"""Every error a user can meet. Each message is one sentence that says what to do next.

The command line prints it as one line on standard error and exits with `exit_status`; a Python caller can catch
`OnestillError` for all of them, or the built-in class that each also is (`ValueError`, `ImportError`, ...).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = [
    "CheckpointError",
    "DataError",
    "ImageError",
    "MissingExtraError",
    "ModelNotFoundError",
    "NotEnoughMemoryError",
    "NotFiniteError",
    "OnestillError",
    "OutputError",
    "PromptError",
    "RecipeError",
    "ScheduleError",
    "SizeError",
    "StepsError",
    "UnsafeFormatError",
    "first_line",
    "near",
    "require",
]


class OnestillError(Exception):
    """A mistake the user can put right. `exit_status` is what the command line exits with."""

    exit_status: int = 2


class PromptError(OnestillError, ValueError):
    """A prompt that nothing can be drawn from: empty, or not text."""


class SizeError(OnestillError, ValueError):
    """A height or width (pixels) that the model cannot make."""


class StepsError(OnestillError, ValueError):
    """A number out of its range: steps, guidance scale, strength, number of images or seed."""


class ScheduleError(OnestillError, ValueError):
    """A noise schedule, prediction type or timestep that has no meaning."""


class ImageError(OnestillError, ValueError):
    """An input image that cannot be read or used."""


class ModelNotFoundError(OnestillError, LookupError):
    """No model has the given name or path."""


class NotEnoughMemoryError(OnestillError, MemoryError):
    """A model or a request that does not fit into memory. The engine works on for the next request."""


class NotFiniteError(OnestillError, ArithmeticError):
    """A network that produced NaN or infinity, so that there is no picture."""

    @classmethod
    def of(cls, what: str, dtype: str) -> NotFiniteError:
        """The error for `what`, such as "the latents", computed in `dtype`."""
        fix = "load it in another dtype, such as bfloat16 or float32" if dtype != "float32" else "copy its files again"
        return cls(f"The model produced NaN or infinity: {what} overflowed in {dtype}; {fix}.")


class CheckpointError(OnestillError, ValueError):
    """A model whose files are missing, truncated, changed or of an unknown kind."""


class UnsafeFormatError(CheckpointError):
    """A file that runs code when it is read (a pickle); never opened."""


class OutputError(OnestillError):
    """A file that cannot be written, or that exists and may not be overwritten."""


class RecipeError(OnestillError, ValueError):
    """A training recipe with an unknown key, a wrong type or a value out of range."""


class DataError(OnestillError, ValueError):
    """Training or evaluation data that cannot be used at all (a single bad sample is skipped, not an error)."""


class MissingExtraError(OnestillError, ImportError):
    """A feature whose packages are not installed.

    Args:
        extra: the name of the extra that brings the package, as in `onestill[extra]`.
        package: the import name that is missing.
    """

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(f"This needs the package '{package}', which is not installed: pip install 'onestill[{extra}]'")
        self.extra = extra
        self.package = package

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        # Exception would rebuild from the finished message, which the constructor does not take.
        return type(self), (self.extra, self.package)


def first_line(error: Exception) -> str:
    """What another library's error says, as part of a sentence; its kind where it says nothing."""
    return str(error).strip().split("\n", 1)[0][:200] or type(error).__name__


def near(name: str, names: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the likest of `names`, or `""` when nothing is like `name`. Case is ignored."""
    by_folded = {candidate.casefold(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f" Did you mean '{by_folded[matches[0]]}'?" if matches else ""


def require(package: str, extra: str) -> ModuleType:
    """Import and return `package` (dotted names allowed).

    Raises:
        MissingExtraError: the package is not installed; names the extra that brings it. A package that is
            installed but fails to import one of its own parts raises what it raises.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or not (package == error.name or package.startswith(error.name + ".")):
            raise
        raise MissingExtraError(extra, package) from error
