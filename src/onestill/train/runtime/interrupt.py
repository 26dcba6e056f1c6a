"""Signals that end a run: Ctrl-C, SIGTERM and SIGHUP are requests to save and stop.

They come from a person, from `timeout`, from a scheduler that takes the machine back, from torchrun and from a lost
terminal; often twice at once, as the whole process group gets what its parent then hands on.
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from onestill.train.runtime import parallel

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
REPEAT_S = 1.0  # a second signal that comes sooner is the same request by another way
MEET_S = 2.0  # how often processes ask each other; torchrun kills those that have not ended 30 s after its signal


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, saved and stopped.

    Attributes:
        signum: the signal. iteration: where the run stands.
    """

    def __init__(self, signum: int, iteration: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} at iteration {iteration}")
        self.signum, self.iteration = signum, iteration


class Interrupt:
    """While entered, the first signal is a request; a second Ctrl-C a second or more later stops at once.

    What is ignored when it is entered stays so, as a run under `nohup` is to outlive its terminal; but for Ctrl-C,
    which a shell's background jobs are deaf to.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}
        self._meeting = 0  # the iteration at which the processes ask each other
        self._met: tuple[int, float] | None = None

    def __enter__(self) -> Interrupt:
        try:
            for signum in SIGNALS:
                before = signal.getsignal(signum)
                if signum == signal.SIGINT or before != signal.SIG_IGN:
                    signal.signal(signum, self._ask)
                    self._before[signum] = before
        except ValueError:  # not the main thread: whoever runs us there handles signals
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, before in self._before.items():
            if before is not None:  # what was installed by no Python code cannot be put back by it
                signal.signal(signum, before)

    def asked(self, iteration: int) -> bool:
        """Whether to stop before this iteration. Several processes ask each other now and then, and stop together."""
        if parallel.world() == 1:
            return self.signum is not None
        if iteration < self._meeting:
            return False
        now = time.monotonic()
        each_s = 0.0 if self._met is None else (now - self._met[1]) / (iteration - self._met[0])
        found = parallel.gathered((self.signum, each_s))
        # All reckon with the same numbers, so that all come to the same next meeting.
        slowest_s = max(seconds for _, seconds in found)
        self._met, self._meeting = (iteration, now), iteration + (max(1, int(MEET_S / slowest_s)) if slowest_s else 1)
        agreed = next((signum for signum, _ in found if signum is not None), None)
        if agreed is not None:  # else one may have come meanwhile, for the next meeting
            self.signum = agreed
        return agreed is not None

    def _ask(self, signum: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._asked_at = signum, now
        elif signum == signal.SIGINT and now - self._asked_at >= REPEAT_S:
            raise KeyboardInterrupt
