"""Whose turn it is: fair queues of pictures, without threads or clocks of their own.

Turns go by picture, not by request: ten pictures asked for at once are ten turns, and between them everyone else has
theirs. The turn is whoever's has been served least (start-time fair queueing; a picture costs its steps).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from onestill.serve.queue.jobs import Job, Picture

__all__ = ["Client", "Task", "Turns", "Unit"]

NAMES_KEPT = 4096


@dataclass(eq=False)
class Task:
    """A job under way.

    Attributes:
        submitted: when, in seconds of the caller's clock.
        address: where it was asked from, hidden; "" where that says nothing.
        on_picture: called with each picture's index as it is drawn.
        started: how many of its pictures have had their turn.
        pictures: index -> what was drawn.
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
        """How many of its pictures wait for their turn; none once it is answered or cancelled."""
        return 0 if self.future.done() else len(self.job.seeds) - self.started


@dataclass(eq=False)
class Client:
    """Someone who waits.

    Attributes:
        live: has a slot instead of a queue.
        served: virtual time, the steps drawn for it; never behind the clock when it comes anew.
        turn: of its last picture; of two served alike, the one that waited longer goes first.
    """

    live: bool = False
    served: float = 0.0
    turn: int = 0
    tasks: deque[Task] = field(default_factory=deque)


Unit = tuple[Task, int]  # one picture: its task and the index of its seed


class Turns:
    """Who waits, and who is next. Not safe for threads by itself; the scheduler holds its lock."""

    def __init__(self) -> None:
        self.clients: list[Client] = []  # that have tasks
        self._named: dict[str, Client] = {}
        self._clock = 0.0
        self._turns = 0

    def named(self, name: str) -> Client:
        """The client of this name, remembered while it is ahead of others, so that coming anew gains nothing."""
        if len(self._named) > NAMES_KEPT:
            self._named = {name: one for name, one in self._named.items() if one.tasks or one.served > self._clock}
        return self._named.setdefault(name, Client())

    def add(self, task: Task) -> list[Task]:
        """Queue a task at the end of its client's, or in its slot; returns those it replaces there."""
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
        """Every task that waits, wholly or in part."""
        return (task for client in self.clients for task in client.tasks)

    @property
    def waiting(self) -> int:
        """How many pictures wait."""
        return sum(task.waiting for task in self.tasks())

    def sweep(self, expired: Callable[[Task], bool]) -> tuple[list[Task], list[Task]]:
        """Drop what needs no more turns; returns the tasks that were cancelled, and those that are `expired`."""
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
            client = min(fit, key=lambda one: (one.served, one.turn))
            task = client.tasks[0]
            picked.append((task, task.started))
            task.started += 1
            if not task.waiting:
                client.tasks.popleft()
            self._turns += 1
            client.turn = self._turns
            self._clock = max(self._clock, client.served)
            client.served += task.job.num_inference_steps
        return picked
