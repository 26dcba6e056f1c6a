"""Start-time fair queueing of pictures, without a thread or a clock of its own.

The queue serves pictures, not requests, and visitors, not connections: the next picture is one of the visitor that has
been served least, and of that visitor's clients the one that has been served least. A picture costs its number of
steps.

While another visitor is about, a call of several pictures is not one visitor's alone, as whoever asks meanwhile waits
for its end: each visitor has one request in a call, one picture where somebody else types, and nobody is taken along
who is ahead by more than a picture.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from onestill.serve.queue.jobs import Job, Picture

__all__ = ["Client", "FairQueue", "Task", "Unit", "Visitor"]

LOG = logging.getLogger("onestill.serve")
MOST_NAMES = 4096
# A new cookie makes a new visitor, so the visitors of one address have this many shares together: a household's.
SHARES_OF_ADDRESS = 4
ABOUT_S = 1.0  # a visitor is about for so long after its last request or picture


@dataclass(eq=False)
class Task:
    """A job under way.

    Attributes:
        submitted: when, in seconds of the caller's clock.
        on_picture: called with each picture's index as it is drawn.
        started: how many of its pictures have left the queue.
        pictures: those that are drawn, by index.
    """

    job: Job
    future: Future[list[Picture]]
    client: Client
    submitted: float
    on_picture: Callable[[int, Picture], None] | None = None
    started: int = 0
    pictures: dict[int, Picture] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """How many of its pictures are in the queue; none once it is answered or cancelled."""
        return 0 if self.future.done() else len(self.job.seeds) - self.started

    def deliver(self, index: int, picture: Picture) -> None:
        """Hand one of its pictures out, and with the last one all of them."""
        self.pictures[index] = picture
        self.hand_on(index, picture)
        if len(self.pictures) == len(self.job.seeds):
            with suppress(InvalidStateError):  # cancelled in this very moment
                self.future.set_result([self.pictures[i] for i in range(len(self.job.seeds))])

    def hand_on(self, index: int, picture: Picture) -> None:
        """Hand one of its pictures out, or a partial image of it."""
        if self.on_picture is not None and not self.future.done():
            try:
                self.on_picture(index, picture)
            except Exception:
                LOG.exception("A picture could not be handed on.")

    def fail(self, error: Exception) -> None:
        """Answer it with an error, unless it is answered."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(eq=False)
class _Turn:
    """What decides whose turn it is.

    Attributes:
        served: virtual time: the steps drawn for it. It is never far behind the clock when it returns.
        last_pick: the number of its last pick; of two served alike, the one that waited longer goes first.
    """

    served: float = 0.0
    last_pick: int = 0

    @property
    def turn(self) -> tuple[float, int]:
        return self.served, self.last_pick


@dataclass(eq=False)
class Visitor(_Turn):
    """Someone who waits, by one or more clients.

    Attributes:
        address: the keyed hash of the address it asked from last; "" where it does not count.
        clients: those that have tasks.
        clock: the virtual time of the shares inside.
        slots: how many of its live connections are open.
        seen: when it last asked or was drawn for.
        types: whether its last request came on a live connection.
    """

    address: str = ""
    clients: list[Client] = field(default_factory=list)
    named: dict[str, Client] = field(default_factory=dict)
    clock: float = 0.0
    slots: int = 0
    seen: float = float("-inf")
    types: bool = False

    def next_client(self, shape: object) -> Client | None:
        """The client whose turn it is, of those whose next picture has this shape; None is any shape."""
        fit = [one for one in self.clients if one.tasks and shape in (None, one.tasks[0].job.shape)]
        return min(fit, key=lambda one: one.turn, default=None)


@dataclass(eq=False, kw_only=True)
class Client(_Turn):
    """One connection or program of a visitor. A live one has a slot, where a newer task replaces an older one."""

    visitor: Visitor
    live: bool = False
    tasks: deque[Task] = field(default_factory=deque)


Unit = tuple[Task, int]  # one picture: its task and the index of its seed


class FairQueue:
    """The visitors that wait, and which of them is next. Not thread-safe by itself; the scheduler holds a lock."""

    def __init__(self) -> None:
        self._visitors: list[Visitor] = []  # that have tasks
        self._named: dict[str, Visitor] = {}
        self._recent: dict[Visitor, None] = {}  # those seen within ABOUT_S, in that order
        self._clock = 0.0
        self._picks = 0

    def client(self, visitor: str, name: str, address: str) -> Client:
        """A visitor's client of this name. It is remembered while it is ahead, so that returning gains nothing."""
        found = self._visitor(visitor, address)
        if len(found.named) > MOST_NAMES:
            found.named = {name: one for name, one in found.named.items() if one.tasks or one.served > found.clock}
        return found.named.setdefault(name, Client(visitor=found))

    def live_client(self, visitor: str, address: str) -> Client:
        """A new live connection of a visitor; "" is a visitor of its own."""
        found = self._visitor(visitor, address) if visitor else Visitor(address=address)
        found.slots += 1
        return Client(visitor=found, live=True)

    def _visitor(self, name: str, address: str) -> Visitor:
        if len(self._named) > MOST_NAMES:
            self._named = {
                name: one for name, one in self._named.items() if one.clients or one.slots or one.served > self._clock
            }
        found = self._named.setdefault(name, Visitor())
        found.address = address
        return found

    def add(self, task: Task) -> list[Task]:
        """Queue a task behind its client's others, or in its slot; returns the tasks that it replaces there."""
        client, visitor = task.client, task.client.visitor
        replaced = [old for old in client.tasks if old.waiting] if client.live else []
        if client.live:
            client.tasks.clear()
        if not client.tasks:
            client.served = max(client.served, visitor.clock)
        client.tasks.append(task)
        if client not in visitor.clients:
            visitor.clients.append(client)
        if visitor not in self._visitors:
            # One that asks again at once has one picture's credit, or it would lose its place with every answer.
            about = task.submitted - visitor.seen < ABOUT_S
            visitor.served = max(visitor.served, self._clock - (task.job.num_inference_steps if about else 0))
            self._visitors.append(visitor)
        visitor.types = client.live
        self._see(visitor, task.submitted)
        return replaced

    def drawn(self, units: Iterable[Unit], now: float) -> None:
        """Note that a call with these pictures has ended."""
        for task, _ in units:
            self._see(task.client.visitor, now)

    def _see(self, visitor: Visitor, now: float) -> None:
        visitor.seen = now
        self._recent.pop(visitor, None)
        self._recent[visitor] = None

    def tasks(self) -> Iterator[Task]:
        """Every task of which a picture is in the queue."""
        return (task for client in self.clients() for task in client.tasks)

    def clients(self) -> Iterator[Client]:
        """Every client that has tasks."""
        return (client for visitor in self._visitors for client in visitor.clients)

    @property
    def waiting(self) -> int:
        """How many pictures are in the queue."""
        return sum(task.waiting for task in self.tasks())

    def sweep(self, expired: Callable[[Task], bool]) -> tuple[list[Task], list[Task]]:
        """Drop finished tasks; returns the cancelled ones, and those that `expired` says waited too long."""
        cancelled, late = [], []
        for client in self.clients():
            for task in list(client.tasks):
                if task.future.cancelled():
                    cancelled.append(task)
                elif task.waiting and not task.started and expired(task):
                    late.append(task)
                elif task.waiting:
                    continue
                client.tasks.remove(task)
        for visitor in self._visitors:
            visitor.clients = [client for client in visitor.clients if client.tasks]
        self._visitors = [visitor for visitor in self._visitors if visitor.clients]
        return cancelled, late

    def pick(self, most: int, now: float) -> list[Unit]:
        """Up to `most` pictures of equal shape, those of the least served first; `now` is of the tasks' clock."""
        picked: list[Unit] = []
        about = self._about(now)
        latest = 0.0
        while len(picked) < most:
            shape = picked[0][0].job.shape if picked else None
            found = self._next(picked, shape, about, latest)
            if found is None:
                break
            visitor, client = found
            task = client.tasks[0]
            if not picked:
                latest = visitor.served + task.job.num_inference_steps
            picked.append((task, task.started))
            task.started += 1
            if not task.waiting:
                client.tasks.popleft()
            self._charge(visitor, client, task.job.num_inference_steps)
        return picked

    def _about(self, now: float) -> list[Visitor]:
        """Everyone who waits, or was seen a moment ago."""
        for visitor in list(self._recent):
            if now - visitor.seen < ABOUT_S:
                break
            del self._recent[visitor]
        return list({**self._recent, **dict.fromkeys(self._visitors)})

    def _next(
        self, picked: list[Unit], shape: object, about: list[Visitor], latest: float
    ) -> tuple[Visitor, Client] | None:
        """Whose picture comes next in a call; `latest` is how far ahead a visitor may be that is taken along."""
        fit = []
        for visitor in self._visitors:
            client = visitor.next_client(shape)
            if client is None:
                continue
            if len(about) > 1 and picked:
                own = [task for task, _ in picked if task.client.visitor is visitor]
                others_type = any(one.types for one in about if one is not visitor)
                if visitor.served > latest or (own and (others_type or client.tasks[0] is not own[0])):
                    continue
            fit.append((visitor, client))
        return min(fit, key=lambda found: found[0].turn, default=None)

    def _charge(self, visitor: Visitor, client: Client, steps: int) -> None:
        self._picks += 1
        visitor.last_pick = client.last_pick = self._picks
        here = sum(one.address == visitor.address for one in self._visitors) if visitor.address else 1
        self._clock = max(self._clock, visitor.served)
        visitor.served += steps * max(1.0, here / SHARES_OF_ADDRESS)
        visitor.clock = max(visitor.clock, client.served)
        client.served += steps
