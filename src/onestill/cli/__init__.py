"""The command `onestill`: thin wiring over the package, importing nothing heavy until a command needs it."""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]

BROKEN_PIPE = 141  # 128 and the signal's number, as programs end whose reader has gone
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
    if arguments is None:
        _open_streams()
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
    if arguments is None:
        status = _flushed(status)
        if status == 0 and sys.argv[1:2] == ["generate"]:
            os._exit(status)  # every picture is written, and taking OpenVINO apart takes longer than drawing
    return status


def _open_streams() -> None:
    """Open the streams that were closed when the process started: files that are opened would take their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the life of the process)


def _flushed(status: int) -> int:
    """Write out what was printed; the exit status where nobody reads it, or it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python tries once more as it ends
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        print(f"error: The output cannot be written: {error.strerror}; give it another place.", file=sys.stderr)
        return 2
    return status


def _ignore_signals() -> None:
    """The signal that ended the command may come twice, to its process group and to it: it ends without a traceback."""
    import signal

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
