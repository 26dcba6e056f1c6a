"""Time limits on what runs in the main thread. They nest; what overruns its own fails, and only that.

A limit is an alarm signal that raises between two lines of Python. Code that never comes back to Python, such as a
kernel that hangs, does not hear it; `watchdog` ends the process then.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from onestill.errors import OnestillError

__all__ = ["OverranError", "TimeIsUp", "limited"]

AGAIN_S = 3.0  # after which the alarm rings again, where something swallowed the first
SOONEST_S = 0.001


class TimeIsUp(BaseException):  # not an Exception, as libraries catch those and go on
    """Raised by the alarm. `limited` turns it into `OverranError`."""


class OverranError(OnestillError):
    """The body of `limited` took too long and was stopped."""


_ends: list[float] = []


@contextmanager
def limited(seconds: float, what: str) -> Iterator[None]:
    """Stop the body after so many seconds. In the main thread only.

    Raises:
        OverranError: it was stopped.
    """
    ends = time.monotonic() + seconds
    before = signal.signal(signal.SIGALRM, _ring)
    _ends.append(ends)
    try:
        _arm()
        yield
    except TimeIsUp as up:
        _disarm()
        if any(other <= time.monotonic() for other in _ends if other != ends):
            raise  # it is the time of a limit around this one that is up
        raise OverranError(f"{what} took more than {max(seconds, 0):.1f} s and was stopped; give it more time.") from up
    finally:
        _disarm()
        _ends.remove(ends)
        signal.signal(signal.SIGALRM, before)
        if _ends:  # of a limit around this one, whose alarm may be due
            _arm()


def _ring(_signum: int, _frame: FrameType | None) -> None:
    raise TimeIsUp


def _arm() -> None:
    signal.setitimer(signal.ITIMER_REAL, max(min(_ends) - time.monotonic(), SOONEST_S), AGAIN_S)


def _disarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
