"""A door before replicas that may die: whatever it has accepted is answered, by another replica if it must be.

A request is read whole and asked again until someone answers; its id goes along, and names the seed where it has none,
so that every try draws the same. Of a stream, pictures that have gone out are not sent twice. A socket stays open while
what is behind it changes: the newest message is asked again, the others are told that it took their place.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onestill.serve.cluster.proxy_socket import Socket, tries
from onestill.serve.web.errors import ApiError, response_of

__all__ = ["FromFront", "Front"]

PATIENCE_S = 60.0  # how long another replica is looked for; starting one takes less
SILENCE_S = 120.0  # of an answer; the scheduler gives up long before
OURS = b"openai-processing-ms"  # the guard puts it on every answer of a replica; Ray's own have none
HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"content-length", b"expect"}
PROOF, CLIENT = b"x-onestill-front", b"x-onestill-client"


class _Again(Exception):
    """No replica answered this try."""


class Front:
    """ASGI application; see the module.

    Args:
        host, port: where the replicas answer; who of them does is decided there.
        proof: what `FromFront` believes; keep it secret.
        message_bytes: of one live message, as the replicas are bound.
        patience_s: how long to ask again.
    """

    def __init__(self, host: str, port: int, *, proof: str, message_bytes: int, patience_s: float = PATIENCE_S) -> None:
        self.host, self.port = host, port
        self.message_bytes, self.patience_s = message_bytes, patience_s
        self._proof = proof

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or one socket."""
        if scope["type"] == "websocket":
            await Socket(self, scope, receive, send).run()
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    def headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What goes along with a request: its own headers, and who asks."""
        client = scope["client"][0] if scope.get("client") else ""
        own = {PROOF, CLIENT}
        kept = [(name, value) for name, value in scope["headers"] if name not in HOP and name not in own]
        if not any(name == b"x-request-id" for name, _ in kept):
            kept.append((b"x-request-id", secrets.token_hex(16).encode()))
        return [*kept, (PROOF, self._proof.encode()), (CLIENT, client.encode())]

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
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
        with suppress(asyncio.CancelledError):
            await answering

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = self.headers(scope)
        reply = _Reply(send)
        async for _ in tries(self.patience_s):
            try:
                async with aclosing(self._exchange(scope, headers, body)) as events:
                    await reply.take(events)
                return
            except (_Again, OSError, h11.RemoteProtocolError, TimeoutError):
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
        reader, writer = await asyncio.wait_for(asyncio.open_connection(self.host, self.port), 5)
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
    """What goes back to the client, over however many tries."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._seeds: set[int] = set()  # of a stream's pictures that have gone out

    async def take(self, events: AsyncIterator[h11.Event]) -> None:
        """Pass one try's answer on. Raises _Again where it is none."""
        head: h11.Response | None = None
        rest = bytearray()
        async for event in events:
            if isinstance(event, h11.Response):
                head = event
                ours = any(name == OURS for name, _ in head.headers)
                if head.status_code >= 500 and not ours:
                    raise _Again
            elif isinstance(event, h11.Data) and head is not None:
                rest += event.data
                if _is_stream(head):
                    *whole, left = bytes(rest).split(b"\n\n")
                    rest = bytearray(left)
                    for block in whole:
                        await self._pass_event(head, block + b"\n\n")
        if head is None or (head.status_code == 503 and _code(rest) == "closing"):
            raise _Again
        await self._start(head)
        await self._send({"type": "http.response.body", "body": b"" if _is_stream(head) else bytes(rest)})

    async def _pass_event(self, head: h11.Response, block: bytes) -> None:
        data = block.partition(b"data: ")[2]
        found = json.loads(data) if data.startswith(b"{") else {}
        if block.startswith(b"event: error") and found["error"]["code"] == "closing":
            raise _Again
        seed = found.get("seed")
        if seed is not None and seed in self._seeds:
            return
        await self._start(head)
        await self._send({"type": "http.response.body", "body": block, "more_body": True})
        if seed is not None:
            self._seeds.add(seed)

    async def _start(self, head: h11.Response) -> None:
        if self.started:
            return
        self.started = True
        headers = [(name, value) for name, value in head.headers if name not in HOP - {b"content-length"}]
        await self._send({"type": "http.response.start", "status": head.status_code, "headers": headers})


class FromFront:
    """ASGI middleware of a replica: who asks is who the front says.

    Args:
        app: the replica's application.
        proof: the front's.
    """

    def __init__(self, app: ASGIApp, proof: str) -> None:
        self._app, self._proof = app, proof

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on."""
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            if secrets.compare_digest(headers.get(PROOF.decode(), "").encode(), self._proof.encode()):
                scope = {**scope, "client": (headers.get(CLIENT.decode(), ""), 0)}
        await self._app(scope, receive, send)


def _is_stream(head: h11.Response) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in head.headers)


def _code(body: bytearray) -> Any:
    try:
        return json.loads(body)["error"]["code"]
    except (ValueError, TypeError, KeyError):
        return None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
