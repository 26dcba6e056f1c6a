"""What the commands say, and where: results on standard output, everything else on standard error.

Rich is imported only where something is really drawn with it, so that a command that prints one line starts at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
PIPED_COLUMNS = 200
SIGNALLED = 128  # and a signal's number is what shells report for a program that the signal ended
INTERRUPTED = SIGNALLED + 2  # by Ctrl-C


def one_line(text: str) -> str:
    """`text` with every run of white space, line ends included, as one blank."""
    return " ".join(text.split())


def say_error(message: str) -> None:
    """Print `message` as the one line `error: ...` on standard error."""
    print(f"error: {one_line(message)}", file=sys.stderr)


def say_interrupted(status: int = INTERRUPTED) -> int:
    """Say that Ctrl-C, or the signal that `status` is for, was heard; returns that exit status."""
    print("interrupted", file=sys.stderr)
    return status


def note(message: str) -> None:
    """Print something worth knowing, as one line on standard error."""
    print(f"note: {one_line(message)}", file=sys.stderr)


def note_device(asked: str | None, engine: str, device: str) -> None:
    """Say in one line where torch computes, and why, where nobody chose; OpenVINO runs on the CPU alone."""
    from onestill.engine.device import explained, is_auto

    if engine == "torch" and is_auto(asked):
        note(explained(device))


def announced(items: Iterable[T], say: Callable[[], None]) -> Iterator[T]:
    """The items; `say` is called when the first one is asked for."""
    say()
    yield from items


def once(say: Callable[[], None]) -> Callable[[], None]:
    """A function that calls `say` the first time that it is called, and then does nothing."""
    left = [say]
    return lambda: left.pop()() if left else None


def print_json(value: Mapping[str, object]) -> None:
    """Print `value` as one line of JSON on standard output."""
    print(json.dumps(value, allow_nan=False))


def stdout_console() -> Console:
    """Rich's console on standard output; where that is no terminal it has no colours, and room for every table."""
    from rich.console import Console

    shown = sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=not shown, width=None if shown else PIPED_COLUMNS)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error while the body runs; silent where that is no terminal.

    Yields:
        A function to call with how many of `total` were finished since the last call.
    """
    if total <= 1 or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
