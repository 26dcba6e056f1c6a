from __future__ import annotations

import pytest

from onestill.serve.connections import Connections, share_of


class Transport:
    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def opened(connections: Connections, address: str, count: int = 1, *, busy: bool = False) -> list[Transport]:
    found = [Transport() for _ in range(count)]
    for one in found:
        connections.open(one, address)
        if busy:
            connections.busy(one)
    return found


def alive(some: list[Transport]) -> int:
    return sum(not one.is_closed for one in some)


@pytest.mark.parametrize(("held", "share"), [(0, 32), (128, 32), (192, 16), (250, 2), (255, 1), (256, 0), (300, 0)])
def test_shares_shrink_when_more_than_half_is_taken(held: int, share: int) -> None:
    assert share_of(32, 256, held) == share


def test_an_address_beyond_its_share_loses_those_that_were_idle_for_longest() -> None:
    connections = Connections(10, 100)
    other = opened(connections, "b", 5)
    first = opened(connections, "a", 10)
    connections.busy(first[0])
    second = opened(connections, "a", 3)
    assert [one.is_closed for one in first] == [False, True, True, True, *[False] * 6]
    assert alive(second) == 3
    assert alive(other) == 5


def test_an_address_whose_connections_are_all_in_use_gets_no_more() -> None:
    connections = Connections(10, 100)
    used = opened(connections, "a", 10, busy=True)
    assert alive(opened(connections, "a")) == 0
    assert alive(used) == 10
    connections.close(used[0])
    assert alive(opened(connections, "a")) == 1


@pytest.mark.parametrize("busy", [False, True])
def test_a_few_addresses_leave_room_for_others(busy: bool) -> None:
    connections = Connections(32, 256)
    for address in "abcdefgh":
        opened(connections, address, 300, busy=busy)
    for number in range(20):
        assert alive(opened(connections, f"other {number}", busy=True)) == 1


def test_where_all_are_taken_the_heaviest_address_makes_room() -> None:
    connections = Connections(10, 12)
    heavy = opened(connections, "a", 6)
    others = [opened(connections, str(number))[0] for number in range(8)]
    assert (alive(heavy), alive(others)) == (4, 8)


def test_a_proxy_holds_the_connections_of_many() -> None:
    connections = Connections(2, 100)
    assert alive(opened(connections, "", 90)) == 90
    assert alive(opened(connections, "a")) == 1


def test_nothing_is_left_of_connections_that_ended() -> None:
    connections = Connections(3, 10)
    for one in opened(connections, "a", 3):
        connections.close(one)
        connections.close(one)
        connections.idle(one)
        connections.busy(one)
    assert not connections._addresses
    assert not connections._held
    assert not connections._idle
