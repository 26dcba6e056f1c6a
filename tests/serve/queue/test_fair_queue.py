"""Turns go by visitor, and inside a visitor by connection; simulated, without a thread."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future

import pytest

from onestill.serve.queue.fair_queue import Client, FairQueue, Task
from onestill.serve.queue.jobs import Job


class Simulation:
    """Clients that ask again as soon as they are answered; a call takes a second for each of its pictures."""

    def __init__(self, most: int = 4, picture_s: float = 0.05) -> None:
        self.queue = FairQueue()
        self.now = 0.0
        self.most, self.picture_s = most, picture_s
        self.drawn: Counter[str] = Counter()
        self.calls: list[list[str]] = []
        self.clients: list[tuple[str, Client, int]] = []

    def join(self, name: str, client: Client, pictures: int = 1) -> None:
        self.clients.append((name, client, pictures))

    def ask(self) -> None:
        for _, client, pictures in self.clients:
            if not client.tasks:
                self.queue.add(Task(Job("a", tuple(range(pictures)), 1, 32, 32), Future(), client, self.now))

    def run(self, calls: int, *, away: Client | None = None) -> None:
        """`away` asks again only after the next call has begun, as one does whom the network takes time to answer."""
        for _ in range(calls):
            late = [one for one in self.clients if one[1] is away]
            self.clients = [one for one in self.clients if one[1] is not away]
            self.ask()
            units = self.queue.pick(self.most, self.now)
            self.clients += late
            self.ask()
            names = {id(client): name for name, client, _ in self.clients}
            self.calls.append([names.get(id(task.client), "once") for task, _ in units])
            self.drawn.update(self.calls[-1])
            self.now += self.picture_s * len(units)
            self.queue.drawn(units, self.now)
            for task in dict.fromkeys(task for task, _ in units):
                if task.started == len(task.job.seeds):
                    task.future.set_result([])
            self.queue.sweep(lambda task: False)


def test_many_sockets_of_one_visitor_draw_no_more_than_one_of_another() -> None:
    world = Simulation()
    for _ in range(31):
        world.join("many", world.queue.live_client("address:a", "a"))
    one = world.queue.live_client("address:b", "b")
    world.join("one", one)
    world.run(400)
    assert world.drawn["many"] <= 1.1 * world.drawn["one"]


def test_one_whose_next_request_comes_a_moment_late_keeps_its_place() -> None:
    world = Simulation()
    for _ in range(31):
        world.join("many", world.queue.live_client("address:a", "a"))
    one = world.queue.live_client("address:b", "b")
    world.join("one", one)
    world.run(400, away=one)
    assert world.drawn["many"] <= 1.2 * world.drawn["one"]
    assert max(len(call) for call in world.calls[10:]) <= 2  # so that nobody waits for a long call


def test_programs_of_one_address_have_that_addresss_turns_in_equal_shares() -> None:
    world = Simulation(most=1)
    world.join("greedy", world.queue.client("address:a", "1", "a"), 10)
    world.join("modest", world.queue.client("address:a", "2", "a"), 1)
    world.join("other", world.queue.client("address:b", "1", "b"), 1)
    world.run(400)
    assert world.drawn["other"] == pytest.approx(200, abs=3)
    assert world.drawn["greedy"] == pytest.approx(100, abs=3)
    assert world.drawn["modest"] == pytest.approx(100, abs=3)


def test_new_cookies_gain_no_more_than_a_households_shares() -> None:
    world = Simulation(most=1)
    for number in range(40):
        world.join("cookies", world.queue.live_client(f"visitor:{number}", "a"))
    world.join("one", world.queue.live_client("visitor:other", "b"))
    world.run(600)
    assert world.drawn["one"] >= 600 / 5 * 0.9  # of five shares, of which the address with the cookies has four


def test_one_who_is_alone_has_whole_calls() -> None:
    world = Simulation()
    world.join("alone", world.queue.client("a", "", ""), 8)
    world.run(10)
    assert {len(call) for call in world.calls} == {4}
    world = Simulation()
    for number in range(8):
        world.join(str(number), world.queue.live_client("key:a", ""))
    world.run(40)
    assert {len(call) for call in world.calls} == {4}
    assert max(world.drawn.values()) - min(world.drawn.values()) <= 1


def test_a_crowd_has_whole_calls_and_equal_shares() -> None:
    world = Simulation()
    for number in range(16):
        world.join(str(number), world.queue.live_client(f"visitor:{number}", f"{number}"))
    world.run(200)
    assert {len(call) for call in world.calls} == {4}
    assert max(world.drawn.values()) - min(world.drawn.values()) <= 1


def test_while_somebody_types_the_requests_of_others_have_short_calls() -> None:
    world = Simulation()
    world.join("many", world.queue.client("key:a", "", ""), 10)
    typist = world.queue.live_client("visitor:b", "b")
    world.join("typist", typist)
    world.run(100, away=typist)
    assert max(len(call) for call in world.calls[4:]) <= 2


def test_absence_saves_no_turns() -> None:
    world = Simulation(most=1)
    world.join("there", world.queue.client("a", "", ""), 1)
    back = world.queue.client("b", "", "")
    world.queue.add(Task(Job("a", (1,), 1, 32, 32), Future(), back, 0.0))
    world.run(200)
    world.join("back", back, 1)
    world.calls.clear()
    world.run(20)
    counts = Counter(name for call in world.calls for name in call)
    assert abs(counts["back"] - counts["there"]) <= 2


def test_names_are_remembered_while_they_are_ahead_or_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.serve.queue.fair_queue.MOST_NAMES", 10)
    queue = FairQueue()
    live = queue.live_client("visitor:live", "a")
    for number in range(100):
        queue.client(f"visitor:{number}", "", "a")
    assert len(queue._named) <= 11
    assert queue.live_client("visitor:live", "a").visitor is live.visitor
