from __future__ import annotations

from contextlib import closing
from typing import Any

from onestill.serve.access.ledger import Ledger
from onestill.serve.gallery import store
from onestill.serve.gallery.clock import DAY_S, HOUR_S, SteadyClock
from onestill.serve.gallery.store import Gallery, Rules

NOW = 1.7e9
ROW: dict[str, Any] = {"address": "", "prompt": None, "seed": 1, "num_inference_steps": 1, "width": 8, "height": 8}


class Times:
    """A wall clock that can be set, and one that cannot."""

    def __init__(self) -> None:
        self.wall, self.steady = NOW, 50.0

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def clock(self, seen: float | None) -> SteadyClock:
        return SteadyClock(seen, lambda: self.wall, lambda: self.steady)


def test_it_follows_the_clock_and_its_small_corrections() -> None:
    times = Times()
    clock = times.clock(None)
    for correction in (0, 100, -100, 3000, -3000):
        times.pass_(600)
        times.wall += correction
        assert (clock(), clock.sure()) == (times.wall, times.wall)


def test_a_jump_is_believed_after_a_day() -> None:
    for jump in (400 * DAY_S, -400 * DAY_S):
        times = Times()
        clock = times.clock(NOW - 60)
        times.wall += jump
        assert clock() == NOW
        times.pass_(DAY_S / 2)
        assert clock() == NOW + DAY_S / 2
        times.wall -= jump  # set right again
        assert clock() == times.wall
        times.wall += jump
        clock()
        times.pass_(DAY_S - 60)
        assert abs(clock() - times.wall) > 300 * DAY_S
        times.pass_(60)
        assert clock() == times.wall


def test_a_start_with_a_wrong_clock() -> None:
    times = Times()
    late = times.clock(NOW - 3 * DAY_S)  # it was off for a while
    assert (late(), late.sure()) == (NOW, NOW)
    later = times.clock(NOW - 300 * DAY_S)  # or its clock is wrong
    assert (later(), later.sure()) == (NOW, NOW - 300 * DAY_S)
    times.pass_(DAY_S)
    assert (later(), later.sure()) == (times.wall, times.wall)
    early = times.clock(times.wall + 300 * DAY_S)
    assert early() == early.sure() == times.wall + 300 * DAY_S - HOUR_S


def test_a_wrong_clock_deletes_nothing(url: str, monkeypatch: Any) -> None:
    times = Times()
    monkeypatch.setattr(store, "SteadyClock", times.clock)

    def gallery(ledger: Ledger) -> Gallery:
        ledger._noted = float("-inf")
        return Gallery(ledger, Rules(days=30))

    with closing(Ledger(url)) as ledger:
        first = gallery(ledger)
        entry = first.add(b"x", owner="a", **ROW)
        for jump in (400 * DAY_S, -400 * DAY_S):
            times.wall += jump
            assert [first.forget_expired(), gallery(ledger).forget_expired()] == [0, 0]
            assert first.find(entry.id) == entry
            assert abs(first.add(b"y", owner="a", **ROW).made_ms / 1000 - NOW) < DAY_S
            times.wall -= jump
        times.pass_(5 * DAY_S)
        assert gallery(ledger).find(entry.id) == entry
        for _ in range(6):
            times.pass_(5 * DAY_S)
            gallery(ledger).forget_expired()
        assert first.page(9) == []
