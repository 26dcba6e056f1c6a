"""Start-time fair queueing of pictures, without a thread or a clock of its own.

The queue serves pictures, not requests: between two of ten pictures that one client asked for, everyone else is served.
The next picture is one of the client that has been served least; a picture costs its number of steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from onestill.serve.queue.jobs import Job, Picture

__all__ = ["Client", "FairQueue", "Task", "Unit"]

MOST_NAMES = 4096


@dataclass(eq=False)
class Task:
    """A job under way.

    Attributes:
        submitted: when, in seconds of the caller's clock.
        address: the keyed hash of the address it came from; "" where it does not count.
        on_picture: called with each picture's index as it is drawn.
        started: how many of its pictures have left the queue.
        pictures: those that are drawn, by index.
    """

    job: Job
    future: Future[list[Picture]]
    client: Client
    submitted: float
    address: str = ""
    on_picture: Callable[[int, Picture], None] | None = None
    started: int = 0
    pictures: dict[int, Picture] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """How many of its pictures are in the queue; none once it is answered or cancelled."""
        return 0 if self.future.done() else len(self.job.seeds) - self.started


@dataclass(eq=False)
class Client:
    """Someone who waits.

    Attributes:
        live: has a slot, where a newer task replaces an older one.
        served: virtual time: the steps drawn for it. It is never behind the clock when the client returns.
        last_pick: the number of its last pick; of two clients served alike, the one that waited longer goes first.
    """

    live: bool = False
    served: float = 0.0
    last_pick: int = 0
    tasks: deque[Task] = field(default_factory=deque)


Unit = tuple[Task, int]  # one picture: its task and the index of its seed


class FairQueue:
    """The clients that wait, and which of them is next. Not thread-safe by itself; the scheduler holds a lock."""

    def __init__(self) -> None:
        self.clients: list[Client] = []  # that have tasks
        self._named: dict[str, Client] = {}
        self._clock = 0.0
        self._picks = 0

    def named(self, name: str) -> Client:
        """The client of this name. It is remembered while it is ahead of others, so that returning gains nothing."""
        if len(self._named) > MOST_NAMES:
            self._named = {name: one for name, one in self._named.items() if one.tasks or one.served > self._clock}
        return self._named.setdefault(name, Client())

    def add(self, task: Task) -> list[Task]:
        """Queue a task behind its client's others, or in its slot; returns the tasks that it replaces there."""
        client = task.client
        replaced = [old for old in client.tasks if old.waiting] if client.live else []
        if client.live:
            client.tasks.clear()
        if not client.tasks:
            client.served = max(client.served, self._clock)
        client.tasks.append(task)
        if client not in self.clients:
            self.clients.append(client)
        return replaced

    def tasks(self) -> Iterator[Task]:
        """Every task of which a picture is in the queue."""
        return (task for client in self.clients for task in client.tasks)

    @property
    def waiting(self) -> int:
        """How many pictures are in the queue."""
        return sum(task.waiting for task in self.tasks())

    def sweep(self, expired: Callable[[Task], bool]) -> tuple[list[Task], list[Task]]:
        """Drop finished tasks; returns the cancelled ones, and those that `expired` says waited too long."""
        cancelled, late = [], []
        for client in self.clients:
            for task in list(client.tasks):
                if task.future.cancelled():
                    cancelled.append(task)
                elif task.waiting and not task.started and expired(task):
                    late.append(task)
                elif task.waiting:
                    continue
                client.tasks.remove(task)
        self.clients = [client for client in self.clients if client.tasks]
        return cancelled, late

    def pick(self, most: int) -> list[Unit]:
        """Up to `most` pictures of equal shape, those of the least served clients first."""
        picked: list[Unit] = []
        while len(picked) < most:
            shape = picked[0][0].job.shape if picked else None
            fit = [one for one in self.clients if one.tasks and shape in (None, one.tasks[0].job.shape)]
            if not fit:
                break
            client = min(fit, key=lambda one: (one.served, one.last_pick))
            task = client.tasks[0]
            picked.append((task, task.started))
            task.started += 1
            if not task.waiting:
                client.tasks.popleft()
            self._picks += 1
            client.last_pick = self._picks
            self._clock = max(self._clock, client.served)
            client.served += task.job.num_inference_steps
        return picked
