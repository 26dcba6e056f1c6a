"""How many connections an address may hold, so that neither one address nor a few of them keep all others out."""

from __future__ import annotations

import math
from collections import Counter
from typing import Protocol

__all__ = ["Connections", "share_of"]


class _Transport(Protocol):
    def close(self) -> None: ...


def share_of(each: int, most: int, held: int) -> int:
    """How many connections one address may hold.

    Args:
        each: its share while at most half of all are taken; it falls to nothing from there.
        most: connections of all addresses.
        held: those that are taken.
    """
    return min(each, math.ceil(each * 2 * max(0, most - held) / most))


class Connections:
    """The open connections of a server. Where an address has its share, or all are taken, an idle one makes room.

    An idle connection is one on which no request is being answered. The one that was idle for longest is closed, of the
    address itself or of the address that holds most.

    Args:
        each, most: of one address, and of all; see `share_of`.
    """

    def __init__(self, each: int, most: int) -> None:
        self._each, self._most = each, most
        self._addresses: dict[_Transport, str] = {}
        self._held: Counter[str] = Counter()
        self._idle: dict[str, dict[_Transport, None]] = {}  # of each address, longest first

    def open(self, transport: _Transport, address: str) -> None:
        """Take a new connection on, idle as yet. It is closed where there is no room, or where it must make room.

        Args:
            transport: the connection.
            address: whose share it takes; "" is a proxy's, which holds those of many.
        """
        held = self._held[address]
        room = self._most if address == "" else share_of(self._each, self._most, self._held.total())
        if (held >= room or self._held.total() >= self._most) and not self._make_room(address, held):
            transport.close()
            return
        self._addresses[transport] = address
        self._held[address] += 1
        self.idle(transport)

    def _make_room(self, address: str, held: int) -> bool:
        donor = address
        if held < self._each and self._idle:
            heaviest = max(self._idle, key=lambda one: self._held[one] if one else 0)
            donor = heaviest if self._held[heaviest] > held else address
        found = next(iter(self._idle.get(donor, ())), None)
        if found is None:
            return False
        self.close(found)
        found.close()
        return True

    def idle(self, transport: _Transport) -> None:
        """Note that its requests are answered."""
        if transport in self._addresses:
            self._idle.setdefault(self._addresses[transport], {})[transport] = None

    def busy(self, transport: _Transport) -> None:
        """Note that a request, or a socket, has begun."""
        address = self._addresses.get(transport)
        if address in self._idle:
            self._idle[address].pop(transport, None)
            if not self._idle[address]:
                del self._idle[address]

    def close(self, transport: _Transport) -> None:
        """Note that it has ended."""
        self.busy(transport)
        address = self._addresses.pop(transport, None)
        if address is not None:
            self._held[address] -= 1
            if not self._held[address]:
                del self._held[address]
