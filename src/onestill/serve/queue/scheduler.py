"""One thread owns the model; everyone else hands it jobs and holds a future.

A live connection has a slot: a new job replaces the one that still waits there. Other requests queue, and the queue is
bounded, in all and for each client. `fair_queue` says which picture is next; when more than one client waits, pictures
of equal shape are drawn in one call. Whatever the engine does, each request gets one answer and the thread goes on.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onestill.engine.memory import is_memory_error
from onestill.errors import NotEnoughMemoryError, NotFiniteError, OnestillError
from onestill.serve.errors import Busy, Closing, EngineFault, Superseded, TooLate
from onestill.serve.process import lower_priority
from onestill.serve.queue.fair_queue import Client, FairQueue, Task, Unit
from onestill.serve.queue.jobs import Job, Picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from onestill.pipeline import Output, Pipeline

__all__ = ["Limits", "Scheduler", "Slot"]

LOG = logging.getLogger("onestill.serve")
FAULTS_TO_BREAK = 3  # in a row, after which new work is refused for a while
LONGEST_BREAK_S = 60.0
GOOD_TO_GROW = 100  # calls without a fault, after which a batch that was halved is doubled again


class _Stopped(Exception):
    """Nobody wants what is being drawn any more."""


@dataclass(frozen=True)
class Limits:
    """How much a scheduler takes on.

    Attributes:
        waiting: pictures in the queue, without those in slots.
        waiting_each: of those, of one client; one address may have half of `waiting`, where that is more.
        batch: pictures in one call of the pipeline.
        window_ms: how long a call waits for more pictures when more than one client waits already.
        timeout_s: how long a request may wait for its first picture to begin.
        stuck_s: a call that takes longer makes the server not ready.
    """

    waiting: int = 64
    waiting_each: int = 20
    batch: int = 4
    window_ms: float = 3.0
    timeout_s: float = 30.0
    stuck_s: float = 120.0


class Slot:
    """The place of one live connection in the queue: a new job replaces one that still waits. See `Scheduler.slot`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._client = Client(live=True)

    def put(self, job: Job) -> Future[list[Picture]]:
        """Queue a job; the future of the one that it replaces ends with `Superseded`.

        Raises:
            Closing, EngineFault: the server takes no work at present.
        """
        return self._scheduler._add(job, self._client, "", None)

    def close(self) -> None:
        """Give the slot up: what waits is cancelled, what runs is stopped at its next stage."""
        self._scheduler._forget(self._client)


class Scheduler:
    """Runs a pipeline in a thread of its own, one call at a time. Safe to use from any thread. Close it when done.

    A future's callbacks run in that thread, so they must be short; `asyncio.wrap_future` is. Cancelling a future
    withdraws its job, also while it is drawn: the call ends at its next stage once nobody waits for it.

    Args:
        pipe: a loaded model.
        limits: how much to take on.
    """

    def __init__(self, pipe: Pipeline, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.counts: Counter[str] = Counter()  # drawn, calls, superseded, cancelled, expired, refused, faults
        self._pipe = pipe
        self._changed = threading.Condition()
        self._queue = FairQueue()
        self._batch = self.limits.batch
        self._running: list[Unit] = []
        self._running_since: float | None = None
        self._picture_s = 0.05  # a running mean, for Retry-After
        self._good = 0
        self._faults = 0
        self._broken_until = 0.0
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, name="onestill-model", daemon=True)
        self._thread.start()

    # --- asking -----------------------------------------------------------------------------------------------------

    def submit(
        self, job: Job, client: str, address: str = "", on_picture: Callable[[int, Picture], None] | None = None
    ) -> Future[list[Picture]]:
        """Queue a job.

        Args:
            job: what to draw.
            client: the name of who asks; the fair queue alternates between clients.
            address: where from, as many clients may be one person; "" where that says nothing.
            on_picture: called in the model's thread with each picture's index as it is drawn, in any order, and with
                its partial images before.

        Raises:
            Busy: the queue is full, or the client's part of it, or the address's.
            Closing, EngineFault: the server takes no work at present.
        """
        with self._changed:
            return self._add(job, self._queue.named(client), address, on_picture)

    def slot(self) -> Slot:
        """A place for one live connection."""
        return Slot(self)

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
        now = time.monotonic()
        if self._closing:
            return "closing"
        if not self._thread.is_alive():
            return "the model's thread ended"
        if now < self._broken_until:
            return "the engine fails"
        if self._running_since is not None and now - self._running_since > self.limits.stuck_s:
            return "the engine does not answer"
        return None

    # --- ending -----------------------------------------------------------------------------------------------------

    def close(self, grace_s: float = 0.0) -> None:
        """Refuse new work, give what was accepted up to `grace_s` seconds, answer the rest with `Closing`.

        What runs then is stopped at its next stage. Returns when the thread has ended, or one second later.
        """
        deadline = time.monotonic() + grace_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._running and not self._queue.waiting,
                max(0.0, deadline - time.monotonic()),
            )
            self._ended = True
            left = {*self._queue.tasks(), *(task for task, _ in self._running)}
            self._changed.notify_all()
        for task in left:
            _fail(task, Closing("The server is closing; try again in a moment.", 5))
        self._thread.join(1.0)

    # --- the queue, all under the lock ------------------------------------------------------------------------------

    def _add(
        self, job: Job, client: Client, address: str, on_picture: Callable[[int, Picture], None] | None
    ) -> Future[list[Picture]]:
        with self._changed:
            self._check_open()
            self._sweep()
            if not client.live:
                self._check_room(job, client, address)
            task = Task(job, Future(), client, time.monotonic(), address, on_picture)
            replaced = self._queue.add(task)
            self.counts["superseded"] += len(replaced)
            self._changed.notify_all()
        for old in replaced:
            _fail(old, Superseded("A newer request took its place."))
        return task.future

    def _check_open(self) -> None:
        if self._closing:
            raise Closing("The server is closing; try again in a moment.", 5)
        left = self._broken_until - time.monotonic()
        if left > 0:
            self.counts["refused"] += 1
            raise EngineFault("The engine fails at present; try again later.", left)

    def _check_room(self, job: Job, client: Client, address: str) -> None:
        new, limits = len(job.seeds), self.limits
        own = sum(task.waiting for task in client.tasks)
        queued = [task for task in self._queue.tasks() if not task.client.live]
        everyone = sum(task.waiting for task in queued)
        here = sum(task.waiting for task in queued if address and task.address == address)
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
            _fail(task, TooLate("The request waited too long in the queue; try again in a moment.", 5))

    def _forget(self, client: Client) -> None:
        with self._changed:
            mine = [*client.tasks, *(task for task, _ in self._running if task.client is client)]
        for task in mine:
            task.future.cancel()

    def _next(self) -> list[Unit]:
        """Wait for work and pick the pictures of the next call; none when the scheduler ended."""
        lingered = False
        while not self._ended:
            self._sweep()
            waiting = self._queue.waiting
            if not waiting:
                self._changed.wait()
            elif len(self._queue.clients) > 1 and waiting < self._batch and not lingered:
                lingered = True
                self._changed.wait(self.limits.window_ms / 1000)
            else:
                return self._queue.pick(self._batch)
        return []

    # --- drawing, all in the model's thread -------------------------------------------------------------------------

    def _run(self) -> None:
        lower_priority()
        while True:
            with self._changed:
                units = self._next()
                if not units:
                    return
                self._running, self._running_since = units, time.monotonic()
            self._draw(units)
            with self._changed:
                self._running, self._running_since = [], None
                self._changed.notify_all()

    def _draw(self, units: list[Unit], *, again: bool = False) -> None:
        units = [unit for unit in units if not unit[0].future.done()]
        if not units:
            return
        started = time.monotonic()
        try:
            output = self._call(units)
        except _Stopped:
            return
        except Exception as error:  # whatever an engine raises, this thread must go on
            self._after_error(units, error, again)
            return
        took = time.monotonic() - started
        self._picture_s += 0.1 * (took / len(units) - self._picture_s)
        self._faults, self._broken_until = 0, 0.0
        self._good += 1
        if self._good >= GOOD_TO_GROW and self._batch < self.limits.batch:
            self._batch, self._good = min(self.limits.batch, self._batch * 2), 0
        self.counts.update(calls=1, drawn=len(units))
        for i, (task, index) in enumerate(units):
            _deliver(task, index, _picture(output, i, (started - task.submitted) * 1000))

    def _call(self, units: list[Unit]) -> Output:
        job = units[0][0].job

        def pause() -> None:
            if self._ended or all(task.future.done() for task, _ in units):
                raise _Stopped

        def on_partial(i: int, partial: int, image: Image) -> None:
            task, index = units[i]
            _hand_on(task, index, Picture(image, task.job.seeds[index], {"prompt": task.job.prompt}, (), {}, partial))

        return self._pipe(
            [task.job.prompt for task, _ in units],
            seed=[task.job.seeds[index] for task, index in units],
            num_inference_steps=job.num_inference_steps,
            height=job.height,
            width=job.width,
            image=job.image,
            mask=job.mask,
            strength=job.strength,
            pause=pause,
            partial_images=job.partial_images,
            on_partial=on_partial,
        )

    def _after_error(self, units: list[Unit], error: Exception, again: bool) -> None:
        """Draw a failed call's pictures one by one, draw once more where memory ran out, or answer with the error."""
        is_request_error = isinstance(error, OnestillError) and not isinstance(
            error, NotEnoughMemoryError | NotFiniteError
        )
        no_memory = is_memory_error(error)
        if not is_request_error:
            self.counts["faults"] += 1
            self._good = 0
            LOG.error("The engine failed on %d pictures.", len(units), exc_info=error)
        if no_memory:
            self._batch = max(1, self._batch // 2)
            _free_memory()
        if len(units) > 1 or (no_memory and not again):
            for unit in units:
                self._draw([unit], again=True)
            return
        if is_request_error:
            _fail(units[0][0], error)
            return
        self._faults += 1
        if self._faults >= FAULTS_TO_BREAK:
            self._broken_until = time.monotonic() + min(LONGEST_BREAK_S, 2.0 ** (self._faults - FAULTS_TO_BREAK))
        _fail(units[0][0], EngineFault("The engine failed on this picture; try again.", 1))


def _picture(output: Output, index: int, queue_ms: float) -> Picture:
    times = {name: getattr(output.timings, name) for name in ("encode_ms", "denoise_ms", "decode_ms")}
    return Picture(
        output.images[index],
        output.seeds[index],
        output.metadata(index),
        output.notes_on(index),
        {"queue_ms": queue_ms} | times,
    )


def _deliver(task: Task, index: int, picture: Picture) -> None:
    task.pictures[index] = picture
    _hand_on(task, index, picture)
    if len(task.pictures) == len(task.job.seeds):
        with suppress(InvalidStateError):  # cancelled in this very moment
            task.future.set_result([task.pictures[i] for i in range(len(task.job.seeds))])


def _hand_on(task: Task, index: int, picture: Picture) -> None:
    if task.on_picture is not None and not task.future.done():
        try:
            task.on_picture(index, picture)
        except Exception:
            LOG.exception("A picture could not be handed on.")


def _fail(task: Task, error: Exception) -> None:
    with suppress(InvalidStateError):
        task.future.set_exception(error)


def _free_memory() -> None:
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
