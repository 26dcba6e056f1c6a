"""A proxy before replicas that may die: whatever it has accepted is answered, by another replica if need be.

It reads a request whole and sends it again until a replica answers. The request's id goes along and names the seed
where the request has none, so that every try draws the same picture. Pictures of a stream that have gone out are not
sent twice. Sockets are in `proxy_socket`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send

from onestill.serve.cluster.proxy_socket import ProxySocket
from onestill.serve.cluster.upstream import HOP_BY_HOP, Upstream, retries
from onestill.serve.errors import ApiError
from onestill.serve.web.errors import response_of

__all__ = ["Proxy"]

OPEN_S = 5.0  # a connection to a replica is open by then
SILENCE_S = 120.0  # of an answer; the scheduler gives up long before
OURS = b"openai-processing-ms"  # the guard writes this header into every answer of a replica; Ray's own answers lack it


class _NoAnswer(Exception):
    """No replica answered this try, so the request is sent again."""


class Proxy:
    """ASGI application before the replicas; see the module."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or one socket."""
        if scope["type"] == "websocket":
            await ProxySocket(self._upstream, scope, receive, send).run()
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        answering = asyncio.create_task(self._answer(scope, bytes(body), send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
        with suppress(asyncio.CancelledError):
            await answering

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = self._upstream.headers(scope)
        reply = _Reply(send)
        async for _ in retries(self._upstream.patience_s):
            try:
                async with aclosing(self._exchange(scope, headers, body)) as events:
                    await reply.take(events)
                return
            except (_NoAnswer, OSError, h11.RemoteProtocolError, TimeoutError):
                continue
        error = ApiError(503, "No server answers at present; try again in a moment.", "closing", retry_after_s=5)
        if reply.started:
            raise error
        await response_of(error)(scope, _nothing, send)

    async def _exchange(
        self, scope: Scope, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> AsyncGenerator[h11.Event, None]:
        """One try: the events of the answer, to its end."""
        target = scope["raw_path"].partition(b"?")[0] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        connection = h11.Connection(h11.CLIENT)
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(self._upstream.host, self._upstream.port), OPEN_S
        )
        try:
            length = [(b"content-length", str(len(body)).encode())] if scope["method"] not in ("GET", "HEAD") else []
            more = [*length, (b"connection", b"close")]
            request = h11.Request(method=scope["method"], target=target, headers=[*headers, *more])
            for event in (request, *([h11.Data(data=body)] if length else []), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            await writer.drain()
            while not isinstance(found := connection.next_event(), h11.EndOfMessage):
                if found is h11.NEED_DATA:
                    connection.receive_data(await asyncio.wait_for(reader.read(2**16), SILENCE_S))
                elif isinstance(found, h11.Response | h11.Data):
                    yield found
        finally:
            writer.close()


class _Reply:
    """The answer to the client, over however many tries it takes."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._sent: set[tuple[Any, Any]] = set()  # seed and partial index of a stream's pictures that went out

    async def take(self, events: AsyncIterator[h11.Event]) -> None:
        """Pass the answer of one try on. Raises _NoAnswer where a replica is gone."""
        head: h11.Response | None = None
        rest = bytearray()
        async for event in events:
            if isinstance(event, h11.Response):
                head = event
                ours = any(name == OURS for name, _ in head.headers)
                if head.status_code >= 500 and not ours:
                    raise _NoAnswer
            elif isinstance(event, h11.Data) and head is not None:
                rest += event.data
                if _is_stream(head):
                    *whole, left = bytes(rest).split(b"\n\n")
                    rest = bytearray(left)
                    for block in whole:
                        await self._pass_event(head, block + b"\n\n")
        if head is None or (head.status_code == 503 and _code(rest) == "closing"):
            raise _NoAnswer
        await self._start(head)
        await self._send({"type": "http.response.body", "body": b"" if _is_stream(head) else bytes(rest)})

    async def _pass_event(self, head: h11.Response, block: bytes) -> None:
        data = block.partition(b"data: ")[2]
        found = json.loads(data) if data.startswith(b"{") else {}
        if block.startswith(b"event: error") and found["error"]["code"] == "closing":
            raise _NoAnswer
        picture = (found.get("seed"), found.get("partial_image_index"))
        if picture in self._sent:
            return
        await self._start(head)
        await self._send({"type": "http.response.body", "body": block, "more_body": True})
        if picture[0] is not None:
            self._sent.add(picture)

    async def _start(self, head: h11.Response) -> None:
        if self.started:
            return
        self.started = True
        headers = [(name, value) for name, value in head.headers if name not in HOP_BY_HOP]
        await self._send({"type": "http.response.start", "status": head.status_code, "headers": headers})


def _is_stream(head: h11.Response) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in head.headers)


def _code(body: bytearray) -> Any:
    try:
        return json.loads(body)["error"]["code"]
    except (ValueError, TypeError, KeyError):
        return None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
