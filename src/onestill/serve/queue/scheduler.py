"""One thread owns the model; everyone else hands it jobs and holds a future.

A live connection has a slot: a new job replaces the one that still waits there. Other requests queue, and the queue is
bounded, in all and for each visitor. `fair_queue` says which picture is next; when more than one client waits, pictures
of equal shape are drawn in one call. Whatever the engine does, each request gets one answer.

A second thread watches the first: it answers what waits too long, starts the model's thread anew where that ended, and
gives an engine up that does not come to its next stage.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from onestill.engine.memory import is_memory_error
from onestill.errors import NotEnoughMemoryError, NotFiniteError, OnestillError
from onestill.serve.errors import Busy, Closing, EngineFault, Superseded, TooLate
from onestill.serve.process import lower_priority
from onestill.serve.queue.fair_queue import Client, FairQueue, Task, Unit
from onestill.serve.queue.health import HANGS, Health, Stopped, described
from onestill.serve.queue.jobs import Job, Picture
from onestill.serve.queue.model import Model, free_memory

if TYPE_CHECKING:
    from onestill.pipeline import Pipeline

__all__ = ["Limits", "Scheduler", "Slot"]

LOG = logging.getLogger("onestill.serve")
GOOD_TO_GROW = 100  # calls without a fault, after which a batch that was halved is doubled again
WATCH_S = 0.25


@dataclass(frozen=True)
class Limits:
    """How much a scheduler takes on.

    Attributes:
        waiting: pictures in the queue, without those in slots.
        waiting_each: of those, of one visitor; one address may have half of `waiting`, where that is more.
        batch: pictures in one call of the pipeline.
        window_ms: how long a call waits for more pictures when more than one client waits already.
        timeout_s: how long a request may wait for its first picture to begin.
        stuck_s: an engine that needs longer for one stage makes the server not ready.
        hung_s: an engine that needs longer for one stage is given up, and every request is answered.
    """

    waiting: int = 64
    waiting_each: int = 20
    batch: int = 4
    window_ms: float = 3.0
    timeout_s: float = 30.0
    stuck_s: float = 15.0
    hung_s: float = 30.0

    def for_engine(self, slowest_s: float) -> Limits:
        """Limits for an engine of which the slowest stage takes so long when all goes well."""
        return replace(self, stuck_s=max(self.stuck_s, slowest_s), hung_s=max(self.hung_s, 2 * slowest_s))

    def within(self, stage_s: float) -> Limits:
        """These limits for an engine whose stages may take as long as `stage_s` when all goes well."""
        return replace(self, stuck_s=max(self.stuck_s, stage_s / 2), hung_s=max(self.hung_s, stage_s))


class Slot:
    """The place of one live connection in the queue: a new job replaces one that still waits. See `Scheduler.slot`."""

    def __init__(self, scheduler: Scheduler, client: Client) -> None:
        self._scheduler = scheduler
        self._client = client

    def put(self, job: Job) -> Future[list[Picture]]:
        """Queue a job; the future of the one that it replaces ends with `Superseded`.

        Raises:
            Closing, EngineFault: the server takes no work at present.
        """
        return self._scheduler._add(job, self._client, None)

    def close(self) -> None:
        """Give the slot up: what waits is cancelled, what runs is stopped at its next stage."""
        self._scheduler._forget(self._client)


class Scheduler:
    """Runs a pipeline in a thread of its own, one call at a time. Safe to use from any thread. Close it when done.

    A future's callbacks run in that thread or the one that watches it, so they must be short; `asyncio.wrap_future` is.
    Cancelling a future withdraws its job, also while it is drawn: the call ends at its next stage once nobody waits.

    Args:
        pipe: a loaded model. The scheduler holds the only reference that it needs.
        limits: how much to take on.
        load: loads the model once more, where the present one is broken; None never does.

    Attributes:
        on_lost: called once, in any thread, when only a new process helps; every request is answered by then.
    """

    def __init__(
        self, pipe: Pipeline, limits: Limits | None = None, load: Callable[[], Pipeline] | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.counts: Counter[str] = Counter()  # drawn, calls, superseded, cancelled, expired, refused, faults, reloads
        self.on_lost: Callable[[], None] = lambda: None
        self._ended = threading.Event()
        self._model = Model(pipe, load)
        self._health = Health(self._model, self._ended, self.limits.stuck_s, self.limits.hung_s)
        self._changed = threading.Condition()
        self._queue = FairQueue()
        self._batch = self.limits.batch
        self._running: list[Unit] = []
        self._picture_s = 0.05  # a running mean, for Retry-After
        self._good = 0
        self._closing = False
        self._thread = self._started(self._run, "model")
        self._started(self._watch, "watch")

    def _started(self, target: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=f"onestill-{name}", daemon=True)
        thread.start()
        return thread

    # --- asking -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        job: Job,
        visitor: str,
        address: str = "",
        on_picture: Callable[[int, Picture], None] | None = None,
        *,
        client: str = "",
    ) -> Future[list[Picture]]:
        """Queue a job.

        Args:
            job: what to draw.
            visitor: the name of who asks; the fair queue alternates between visitors.
            address: where from, as many visitors may be one person; "" where that says nothing.
            on_picture: called in the model's thread with each picture's index as it is drawn, after its partial images.
            client: which of the visitor's programs or connections asks; the visitor's turns alternate between them.

        Raises:
            Busy: the queue is full, or the visitor's part of it, or the address's.
            Closing, EngineFault: the server takes no work at present.
        """
        with self._changed:
            return self._add(job, self._queue.client(visitor, client, address), on_picture)

    def slot(self, visitor: str = "", address: str = "") -> Slot:
        """A place for one live connection of a visitor, named as in `submit`; "" is a visitor of its own."""
        with self._changed:
            return Slot(self, self._queue.live_client(visitor, address))

    @property
    def waiting(self) -> int:
        """How many pictures are in the queue."""
        with self._changed:
            return self._queue.waiting

    @property
    def batch(self) -> int:
        """How many pictures one call may draw at present: less than the limit after memory ran out."""
        return self._batch

    def why_not_ready(self) -> str | None:
        """Why no work should be sent here at present; None where it may be."""
        return "closing" if self._closing else self.why_dead() or self._health.why_not_ready()

    def why_dead(self) -> str | None:
        """Why this engine draws nothing any more, so that it must be replaced; None where it lives."""
        if not self._thread.is_alive() and not self._closing:
            return "the model's thread ended"
        return self._health.lost

    # --- ending -----------------------------------------------------------------------------------------------------

    def close(self, grace_s: float = 0.0) -> bool:
        """Refuse new work, give what was accepted up to `grace_s` seconds, answer the rest with `Closing`.

        What runs then is stopped at its next stage. Returns when the thread has ended, or one second later.

        Returns:
            Whether the thread has ended; an engine that hangs keeps it.
        """
        deadline = time.monotonic() + (grace_s if self._health.lost is None else 0.0)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._running and not self._queue.waiting,
                max(0.0, deadline - time.monotonic()),
            )
            self._ended.set()
            self._changed.notify_all()
        self._answer_all(Closing("The server is closing; try again in a moment.", 5))
        self._thread.join(1.0)
        return not self._thread.is_alive()

    def _answer_all(self, error: Exception) -> None:
        with self._changed:
            left = {*self._queue.tasks(), *(task for task, _ in self._running)}
        for task in left:
            task.fail(error)

    # --- the queue, all under the lock ------------------------------------------------------------------------------

    def _add(
        self, job: Job, client: Client, on_picture: Callable[[int, Picture], None] | None
    ) -> Future[list[Picture]]:
        with self._changed:
            self._check_open()
            self._sweep()
            if not client.live:
                self._check_room(job, client)
            task = Task(job, Future(), client, time.monotonic(), on_picture)
            replaced = self._queue.add(task)
            self.counts["superseded"] += len(replaced)
            self._changed.notify_all()
        for old in replaced:
            old.fail(Superseded("A newer request took its place."))
        return task.future

    def _check_open(self) -> None:
        if self._closing:
            raise Closing("The server is closing; try again in a moment.", 5)
        left = self._health.refuses_s
        if left > 0:
            self.counts["refused"] += 1
            raise EngineFault("The engine fails at present; try again later.", left)

    def _check_room(self, job: Job, client: Client) -> None:
        new, limits, visitor = len(job.seeds), self.limits, client.visitor
        queued = [task for task in self._queue.tasks() if not task.client.live]
        everyone = sum(task.waiting for task in queued)
        own = sum(task.waiting for task in queued if task.client.visitor is visitor)
        here = sum(
            task.waiting for task in queued if visitor.address and task.client.visitor.address == visitor.address
        )
        most_here = max(limits.waiting // 2, limits.waiting_each)
        if own + new > limits.waiting_each or here + new > most_here or everyone + new > limits.waiting:
            self.counts["refused"] += 1
            wait_s = max(1.0, everyone * self._picture_s)
            raise Busy(f"The queue is full, with {everyone} pictures waiting; try again in a moment.", wait_s)

    def _sweep(self) -> None:
        oldest = time.monotonic() - self.limits.timeout_s
        cancelled, late = self._queue.sweep(lambda task: task.submitted < oldest)
        self.counts.update(cancelled=len(cancelled), expired=len(late))
        for task in late:
            task.fail(TooLate("The request waited too long in the queue; try again in a moment.", 5))

    def _forget(self, client: Client) -> None:
        with self._changed:
            client.visitor.slots -= 1
            mine = [*client.tasks, *(task for task, _ in self._running if task.client is client)]
        for task in mine:
            task.future.cancel()

    def _next(self) -> list[Unit]:
        """Wait for work and pick the pictures of the next call; none when the scheduler ended."""
        lingered = False
        while not self._ended.is_set():
            self._sweep()
            waiting = self._queue.waiting
            if not waiting:
                self._changed.wait()
            elif waiting < self._batch and not lingered and len(list(self._queue.clients())) > 1:
                lingered = True
                self._changed.wait(self.limits.window_ms / 1000)
            else:
                return self._queue.pick(self._batch, time.monotonic())
        return []

    # --- watching ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(min(WATCH_S, self.limits.timeout_s / 4, self.limits.hung_s / 4)):
            try:
                self._look()
            except BaseException:  # such as no memory: what was missed now is seen the next time
                LOG.exception("The engine could not be watched.")

    def _look(self) -> None:
        with self._changed:
            self._sweep()
            is_dead = not self._thread.is_alive()
        if self._closing:
            return
        if is_dead:
            LOG.critical("The model's thread ended; the engine is loaded anew.")
            self._fail_all(self._running)
            with self._changed:
                self._running = []
                self._health.thread_died = True
                self._thread = self._started(self._run, "model")
        elif self._health.lost is None and self._health.hangs:
            frame = sys._current_frames().get(self._thread.ident or 0)
            where = "".join(traceback.format_stack(frame)) if frame else ""
            LOG.critical("The engine has not answered for %g s, here:\n%s", self.limits.hung_s, where)
            self._health.lost = HANGS
            self._answer_hopeless()
            self.on_lost()

    def _answer_hopeless(self) -> None:
        self._answer_all(EngineFault("The engine does not draw any more; try again in a moment.", 5))

    def _fail_all(self, units: list[Unit]) -> None:
        for task, _ in units:
            task.fail(EngineFault("The engine failed on this picture; try again.", 1))

    # --- drawing, all in the model's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        lower_priority()
        while not self._ended.is_set():
            try:
                self._health.mend(self._answer_hopeless, self.on_lost)
                with self._changed:
                    self._running = self._next()
                self._draw(self._running)
            except BaseException as error:  # whatever an engine raises, such as SystemExit, this thread must go on
                LOG.error("A call failed.\n%s", described(error, _prompts(self._running)))
                self._fail_all(self._running)
            with self._changed:
                self._queue.drawn(self._running, time.monotonic())
                self._running = []
                self._changed.notify_all()

    def _draw(self, units: list[Unit], *, again: bool = False) -> None:
        units = [unit for unit in units if not unit[0].future.done()]
        if not units:
            return

        def pause() -> None:
            self._health.move()
            if self._ended.is_set() or all(task.future.done() for task, _ in units):
                raise Stopped

        def hand_on(i: int, picture: Picture) -> None:
            units[i][0].hand_on(units[i][1], picture)

        started = time.monotonic()
        self._health.move()
        try:
            pictures = self._model.draw(
                [task.job for task, _ in units], [task.job.seeds[i] for task, i in units], pause, hand_on
            )
        except Stopped:
            return
        except BaseException as error:
            self._after_error(units, error, again)
            return
        finally:
            self._health.rest()
        self._picture_s += 0.1 * ((time.monotonic() - started) / len(units) - self._picture_s)
        self._health.worked()
        self._good += 1
        if self._good >= GOOD_TO_GROW and self._batch < self.limits.batch:
            self._batch, self._good = min(self.limits.batch, self._batch * 2), 0
        self.counts.update(calls=1, drawn=len(units))
        for (task, index), picture in zip(units, pictures, strict=True):
            queue_ms = (started - task.submitted) * 1000
            task.deliver(index, replace(picture, timings={"queue_ms": queue_ms, **picture.timings}))

    def _after_error(self, units: list[Unit], error: BaseException, again: bool) -> None:
        """Draw a failed call's pictures one by one, draw once more where memory ran out, or answer with the error."""
        if isinstance(error, OnestillError) and not isinstance(error, NotEnoughMemoryError | NotFiniteError):
            if len(units) == 1:
                units[0][0].fail(error)
                return
        else:
            self.counts["faults"] += 1
            self._good = 0
            LOG.error("The engine failed on %d pictures.\n%s", len(units), described(error, _prompts(units)))
        no_memory = is_memory_error(error)
        if no_memory:
            self._batch = max(1, self._batch // 2)
            free_memory()
        if len(units) > 1 or (no_memory and not again):
            for unit in units:
                self._draw([unit], again=True)
            return
        self._health.failed()
        self._fail_all(units)


def _prompts(units: list[Unit]) -> set[str]:
    return {task.job.prompt for task, _ in units}
