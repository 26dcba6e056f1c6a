"""The time by which pictures expire: the system's clock, whose jumps delete nothing.

A clock may be wrong for minutes after a machine starts, or be set wrong by hand. What was deleted meanwhile is lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

__all__ = ["SteadyClock"]

LOG = logging.getLogger("onestill.serve")
HOUR_S, DAY_S = 3600.0, 24 * 3600.0
LONGEST_OFF_S = 7 * DAY_S  # a server may be off for so long; a later start may be a wrong clock


class SteadyClock:
    """Seconds since 1970. A jump of the system's clock by more than an hour is believed once it has lasted for a day.

    Args:
        seen: what this clock said last, before the process started; None where it never did.
        wall: the system's clock.
        steady: seconds from any moment, by a clock that nobody sets.
    """

    def __init__(
        self, seen: float | None, wall: Callable[[], float] = time.time, steady: Callable[[], float] | None = None
    ) -> None:
        self._wall, self._steady = wall, steady or _since_boot
        self._started = self._steady()
        self._jumped: float | None = None  # when a jump was seen that is not believed yet
        now = self._wall()
        self._seen = None if seen is None or -HOUR_S <= now - seen <= LONGEST_OFF_S else seen
        self._base = now if seen is None else max(now, seen - HOUR_S), self._started
        if self._seen is not None:
            self._warn(now - self._seen)

    def __call__(self) -> float:
        """The time."""
        steady = self._steady()
        told = self._base[0] + steady - self._base[1]
        gap = self._wall() - told
        if abs(gap) <= HOUR_S or (self._jumped is not None and steady - self._jumped >= DAY_S):
            told += gap
            self._base, self._jumped = (told, steady), None
        elif self._jumped is None:
            self._jumped = steady
            self._warn(gap)
        return told

    def sure(self) -> float:
        """The time that has surely come: what expired before it may be deleted."""
        running = self._steady() - self._started
        told = self()
        return told if self._seen is None or running >= DAY_S else min(told, self._seen + running)

    def _warn(self, gap: float) -> None:
        LOG.warning("The clock jumped by %.1f days; nothing is deleted by it before a day has passed.", gap / DAY_S)


def _since_boot() -> float:
    # Unlike the monotonic clock this goes on while the machine sleeps, where the system has it.
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)
