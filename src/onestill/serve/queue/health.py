"""Whether the engine works: told from its faults in a row and from how long it needs, and mended where that helps."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable

from onestill.serve.queue.model import Model

__all__ = ["HANGS", "Health", "Stopped", "described"]

LOG = logging.getLogger("onestill.serve")
FAULTS_TO_BREAK = 3  # in a row, after which the engine must draw a known picture before anybody else's
LONGEST_BREAK_S = 60.0
RELOAD_S = 900.0  # loading a model takes no longer than that
FAILS, HANGS = "the engine fails", "the engine does not answer"


class Stopped(Exception):
    """Nobody wants what is being drawn any more."""


class Health:
    """The state of the engine, set by the model's thread and read by all.

    Args:
        model: the model's thread alone calls it.
        ended: set when the scheduler ends.
        stuck_s, hung_s: see `onestill.serve.queue.scheduler.Limits`.

    Attributes:
        lost: why the engine was given up; None while it may draw.
        thread_died: whether the model's thread ended by itself, so that the engine is loaded anew before it draws.
    """

    def __init__(self, model: Model, ended: threading.Event, stuck_s: float, hung_s: float) -> None:
        self.lost: str | None = None
        self.thread_died = False
        self._model, self._ended = model, ended
        self._stuck_s, self._hung_s = stuck_s, hung_s
        self._moved: float | None = None  # when the engine came to its present stage
        self._reloading = False
        self._faults = 0  # in a row
        self._refuses_until = 0.0

    # --- what the model's thread tells ---

    def move(self) -> None:
        """Note that the engine begins a stage."""
        self._moved = time.monotonic()

    def rest(self) -> None:
        """Note that the engine has nothing to do. One that was given up while it hung is in use again."""
        self._moved = None
        if self.lost == HANGS:
            LOG.warning("The engine answers again.")
            self.lost = None

    def worked(self) -> None:
        """Note a call that went well."""
        self._faults, self._refuses_until = 0, 0.0

    def failed(self) -> None:
        """Note a picture that could not be drawn by a fault of the engine."""
        self._faults += 1
        if self._faults >= FAULTS_TO_BREAK:
            self._refuses_until = time.monotonic() + 1.0

    def mend(self, give_up: Callable[[], None]) -> None:
        """Where the last calls failed, wait until the engine draws a known picture: rest, load it anew, or give it up.

        So a request that always fails harms nobody else, and an engine that always fails gets no more requests.

        Args:
            give_up: called where the engine fails even when it was loaded anew; then this waits for the end.
        """
        if self._faults < FAULTS_TO_BREAK and not self.thread_died:
            return
        for rests in itertools.count():
            reload = self._model.can_reload and (self.thread_died or rests == 2)
            self.thread_died = False
            if self._works(reload) or self._ended.is_set():
                self.worked()
                return
            if reload:
                LOG.critical("The engine fails even when it is loaded anew.")
                self.lost = FAILS
                give_up()
                self._ended.wait()
                return
            if rests:
                self._refuses_until = time.monotonic() + min(LONGEST_BREAK_S, 2.0 ** (rests - 1))
            self._ended.wait(max(0.0, self._refuses_until - time.monotonic()))

    def _works(self, reload: bool) -> bool:
        def pause() -> None:
            self.move()
            if self._ended.is_set():
                raise Stopped

        self.move()
        self._reloading = reload
        try:
            if reload:
                LOG.warning("The engine is loaded anew.")
                self._model.reload()
                self._reloading = False
            return self._model.works(pause)
        except BaseException as error:  # whatever an engine raises
            LOG.error("The engine failed on a known picture.\n%s", described(error, ()))
            return False
        finally:
            self._reloading = False
            self.rest()

    # --- what others ask ---

    @property
    def refuses_s(self) -> float:
        """For how long new work is refused; 0 where it is not."""
        return 5.0 if self.lost is not None else max(0.0, self._refuses_until - time.monotonic())

    @property
    def hangs(self) -> bool:
        """Whether the engine has needed too long for its present stage to be waited for."""
        return self._in_stage_s > (RELOAD_S if self._reloading else self._hung_s)

    @property
    def _in_stage_s(self) -> float:
        moved = self._moved
        return 0.0 if moved is None else time.monotonic() - moved

    def why_not_ready(self) -> str | None:
        """Why the engine should get no work at present; None where it may."""
        if self.lost is None and self._faults >= FAULTS_TO_BREAK:
            return FAILS
        return HANGS if self.lost is None and self._in_stage_s > self._stuck_s else self.lost


def described(error: BaseException, private: Iterable[str]) -> str:
    """An error with its traceback, for the log; texts of others, such as prompts, are left out of it."""
    text = "".join(traceback.format_exception(error))
    for one in sorted(private, key=len, reverse=True):
        for form in (one, repr(one)[1:-1]):
            if len(form) > 3:  # shorter ones are parts of the traceback's own words, and tell nothing
                text = text.replace(form, "[prompt]")
    return text
