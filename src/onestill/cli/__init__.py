"""The command `onestill`: thin wiring over the package, importing nothing heavy until a command needs it."""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]

MANY_OBJECTS = 50_000  # made before Python looks for garbage; its own 700 is a tenth of the time that imports take


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: what follows the program's name; `sys.argv[1:]` when None.

    Returns:
        0 on success, 2 for a mistake the user can put right (one line on standard error says how),
        130 when interrupted, 128 and its number when a training was ended by another signal.
    """
    gc.set_threshold(MANY_OBJECTS)
    try:
        # Inside the try: Ctrl-C while Python still imports must not end in a traceback.
        from onestill.cli.app import run
        from onestill.cli.console import SIGNALLED

        status = run(arguments)
    except KeyboardInterrupt:
        from onestill.cli.console import say_interrupted

        return say_interrupted()
    if status > SIGNALLED and arguments is None:
        _ignore_signals()
    if status == 0 and arguments is None and sys.argv[1:2] == ["generate"]:
        _leave(status)
    return status


def _ignore_signals() -> None:
    """The signal that ended the command may come twice, to its process group and to it: it ends without a traceback."""
    import signal

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _leave(status: int) -> None:
    """End the process at once: every picture is written, and taking OpenVINO apart takes longer than drawing.

    Returns only where the output cannot be written, which Python reports when it ends in its own way.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return
    os._exit(status)
