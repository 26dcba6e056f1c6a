"""uvicorn's protocols behind an inlet: what one connection sends, or does not read, costs the others little.

Ten thousand chunks, frames or pings fit into one packet, and uvicorn parses all that arrived before anyone else has a
turn. The inlet hands data on in slices, with a turn for the others between them, and stops reading where a connection
has used up its rate. What it has not read waits at the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.server import ServerProtocol

from onestill.serve.access.rate_limit import TokenBucket

__all__ = ["PacedHttp", "PacedSocket"]

SMALLEST, LARGEST = 1024, 65536  # bytes of a slice; large ones for data that has few parts
FEW, MANY = 8, 64  # parts of a slice, with which the next one is larger, or the smallest
BYTES_EACH_S = 16 * 2**20  # of one connection; twice as many may come at once, as with all rates
PARTS_EACH_S = 1000  # requests and chunks; 12 MB in chunks of a kilobyte come within the time for a body
FRAMES_EACH_S = 120  # pings are frames too; 60 live messages may come each second
MESSAGE_S = 30.0  # a message that has begun must have arrived by then
UNREAD_S = 20.0  # a client that reads nothing of what is sent for so long is cut off
ENDING_S = 2.0  # when the server ends, that is shorter
MOST_UNREAD = 64 * 2**20  # bytes that all clients have not read; with more, the one that stalled first is cut off


class Inlet:
    """A transport that hands its data on at a bounded rate, and reads only while nothing holds it back.

    Args:
        transport: the connection's own, which does all else.
        loop: where it runs.
    """

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._data = bytearray()
        self._slice = SMALLEST
        self._holds: set[str] = set()
        self._is_feeding = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def serve(self, feed: Callable[[bytes], int], parts_each_s: float) -> None:
        """Hand the data to another protocol from now on.

        Args:
            feed: takes a slice, and returns in how many parts it was.
            parts_each_s: how many there may be in the long run.
        """
        self._feed = feed
        self._parts = TokenBucket(parts_each_s, 2 * parts_each_s)
        self._bytes = TokenBucket(BYTES_EACH_S, 2 * BYTES_EACH_S)
        self._data.clear()
        self._holds.clear()

    @property
    def is_held(self) -> bool:
        """Whether data waits here, or at the client, for something that is not the client's part."""
        return bool(self._data or self._holds)

    @property
    def is_over_rate(self) -> bool:
        """Whether data waits here because there was too much of it."""
        return "rate" in self._holds

    def put(self, data: bytes) -> None:
        """Take what the connection received."""
        self._data += data
        self._pump()

    def pause_reading(self) -> None:
        """Hand nothing on, as the protocol asks."""
        self.hold("protocol")

    def resume_reading(self) -> None:
        """Go on, as the protocol asks."""
        self.free("protocol")

    def hold(self, why: str) -> None:
        """Hand nothing on until this reason, and every other one, is gone."""
        self._holds.add(why)
        self._transport.pause_reading()

    def free(self, why: str) -> None:
        """A reason is gone."""
        if why in self._holds:
            self._holds.discard(why)
            self._loop.call_soon(self._pump)  # whoever calls may be in the midst of parsing

    def _pump(self) -> None:
        if self._is_feeding or self._holds or self._transport.is_closing():
            return
        if self._data:
            piece = bytes(self._data[: self._slice])
            del self._data[: self._slice]
            self._is_feeding = True
            try:
                parts = self._feed(piece)
            finally:
                self._is_feeding = False
            if parts > MANY:
                self._slice = SMALLEST
            elif parts <= FEW:
                self._slice = min(LARGEST, 2 * self._slice)
            wait_s = max(self._parts.spend(parts), self._bytes.spend(len(piece)))
            if wait_s or self._data:
                why = "rate" if wait_s else "turn"
                self.hold(why)
                self._loop.call_later(wait_s, self.free, why)
        if not self._holds and not self._transport.is_closing():
            self._transport.resume_reading()


class _Stalled:
    """What both protocols do while their client does not read: they read nothing from it, and at last cut it off."""

    transport: Any
    loop: asyncio.AbstractEventLoop
    _is_ending = False
    _all: ClassVar[dict[_Stalled, None]] = {}  # the one that stalled first is first

    def pause_writing(self) -> None:
        """As uvicorn's: called when the client reads more slowly than the server writes."""
        super().pause_writing()  # type: ignore[misc]
        self.transport.hold("unread")
        self._all[self] = None
        if sum(one.transport.get_write_buffer_size() for one in self._all) > MOST_UNREAD:
            next(iter(self._all)).transport.abort()
        self._watch()

    def _watch(self) -> None:
        wait_s = ENDING_S if self._is_ending else UNREAD_S
        self.loop.call_later(wait_s, self._close_if_unread, self.transport.get_write_buffer_size())

    def shutdown(self) -> None:
        """As uvicorn's: called when the server ends."""
        self._is_ending = True
        super().shutdown()  # type: ignore[misc]
        if self in self._all:
            self._watch()

    def resume_writing(self) -> None:
        """As uvicorn's: called when the client has read most of it."""
        super().resume_writing()  # type: ignore[misc]
        self._all.pop(self, None)
        self.transport.free("unread")

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's: called when the connection has ended."""
        self._all.pop(self, None)
        super().connection_lost(exc)  # type: ignore[misc]

    def _close_if_unread(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        elif left:
            self._watch()


class _CountedConnection(h11.Connection):
    parts = 0

    def next_event(self) -> Any:
        """As h11's: the next part of what arrived."""
        self.parts += 1
        return super().next_event()


class PacedHttp(_Stalled, H11Protocol):
    """uvicorn's protocol of HTTP behind an inlet."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = self._counted = _CountedConnection(h11.SERVER)

    def connection_made(self, transport: Any) -> None:
        """As uvicorn's: called when the connection begins."""
        inlet: Any = Inlet(transport, self.loop)
        inlet.serve(self._take, PARTS_EACH_S)
        super().connection_made(inlet)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's: called with what arrived."""
        self.transport.put(data)

    def shutdown(self) -> None:
        """As uvicorn's: called when the server ends, which is not delayed by who sends too much."""
        if self.transport.is_over_rate:
            self.transport.abort()
        else:
            super().shutdown()

    def _take(self, data: bytes) -> int:
        before = self._counted.parts
        super().data_received(data)
        return self._counted.parts - before


class _CountedFrames(ServerProtocol):
    parts = 0

    def events_received(self) -> Any:
        """As that of websockets: the frames of what arrived."""
        found = super().events_received()
        self.parts += len(found)
        return found


class PacedSocket(_Stalled, WebSocketsSansIOProtocol):
    """uvicorn's protocol of sockets behind the inlet of the connection that became one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = self._counted = _CountedFrames(max_size=self.config.ws_max_size, logger=self.logger)
        self._begun: float | None = None  # when the message began that has not arrived whole

    def connection_made(self, transport: Any) -> None:
        """As uvicorn's: called when the connection begins."""
        transport.serve(self._take, FRAMES_EACH_S)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's: called with what arrived."""
        self.transport.put(data)

    def send_receive_event_to_app(self) -> None:
        """As uvicorn's: called with each whole message."""
        self._begun = None
        super().send_receive_event_to_app()

    def _take(self, data: bytes) -> int:
        before = self._counted.parts
        super().data_received(data)
        if not self.frames and not self.conn.reader.buffer:
            self._begun = None
        elif self._begun is None:
            self._begin()
        return 1 + self._counted.parts - before

    def _begin(self) -> None:
        self._begun = self.loop.time()
        self.loop.call_later(MESSAGE_S, self._close_if_unfinished, self._begun)

    def _close_if_unfinished(self, begun: float) -> None:
        if self._begun != begun or self.transport.is_closing():
            return
        if self.transport.is_held:
            self._begin()
        else:
            self.conn.fail(1008, "the message did not arrive in time")
            self.handle_parser_exception()
