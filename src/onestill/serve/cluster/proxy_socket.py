"""A live connection through the proxy: the client's socket stays open while the replica behind it changes.

When a replica dies, its newest message that was not answered goes to another; the older ones are answered `superseded`.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Origin, Subprotocol

from onestill.serve.cluster.upstream import Upstream, retries
from onestill.serve.errors import ApiError
from onestill.serve.web.messages import id_in, read_message, unpack

__all__ = ["ProxySocket"]

LARGEST = 2**25  # of an answer: four pictures of a large model
FINAL = (1000, 1003, 1007, 1008, 1009, 1013)  # the replica closes on purpose; any other code means that it died
OPEN_S = 20.0
# Headers that each connection has of its own.
OWN = {b"host", b"origin"}
HANDSHAKE = (b"sec-websocket", b"connection", b"upgrade")
Sent = str | bytes


class _Refused(Exception):
    """A replica refuses the socket."""


class ProxySocket:
    """One client's socket; see the module."""

    def __init__(self, upstream: Upstream, scope: Scope, receive: Receive, send: Send) -> None:
        self._upstream, self._scope, self._receive, self._send = upstream, scope, receive, send
        self._replica: ClientConnection | None = None
        self._unanswered: list[tuple[int | None, Sent]] = []
        self._lock = asyncio.Lock()  # held while something goes to a replica, or another one is looked for
        self._ready_sent = False

    async def run(self) -> None:
        """Serve until either side ends it."""
        await self._receive()  # websocket.connect
        try:
            self._replica = await self._connect()
        except (_Refused, TimeoutError) as refused:
            code = 1008 if isinstance(refused, _Refused) else 1013
            await self._send({"type": "websocket.close", "code": code, "reason": ""})
            return
        await self._send({"type": "websocket.accept", "subprotocol": self._replica.subprotocol})
        tasks = [asyncio.create_task(side) for side in (self._up(), self._down())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._replica.close()

    async def _connect(self) -> ClientConnection:
        """A replica's socket. Raises _Refused where it refuses, TimeoutError where no replica answers."""
        headers = self._upstream.headers(self._scope)
        more = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in headers
            if name not in OWN and not name.startswith(HANDSHAKE)
        ]
        named = dict(self._scope["headers"])
        origin = named.get(b"origin")
        async for _ in retries(self._upstream.patience_s):
            try:
                return await connect(
                    # The Host is the one that the client sent, as replicas check it too.
                    f"ws://{named.get(b'host', b'localhost').decode('latin-1')}{self._scope['path']}",
                    host=self._upstream.host,
                    port=self._upstream.port,
                    origin=Origin(origin.decode("latin-1")) if origin else None,
                    subprotocols=[Subprotocol(name) for name in self._scope.get("subprotocols", [])] or None,
                    additional_headers=more,
                    user_agent_header=None,
                    compression=None,
                    proxy=None,
                    max_size=LARGEST,
                    open_timeout=OPEN_S,
                    ping_interval=None,  # the client's side has pings; a replica that dies closes
                )
            except InvalidStatus as refusal:
                if refusal.response.status_code < 500:
                    raise _Refused from refusal
            except (OSError, TimeoutError, WebSocketException):
                continue
        raise TimeoutError

    async def _up(self) -> None:
        """Pass messages from the client to the current replica."""
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            data: Sent = text if text is not None else message.get("bytes") or b""
            async with self._lock:
                self._unanswered.append((_id_in(data, self._upstream.message_bytes), data))
                with suppress(ConnectionClosed):  # then another replica is asked
                    await self._here().send(data)

    async def _down(self) -> None:
        """Pass messages from one replica after another to the client."""
        while True:
            replica = self._here()
            with suppress(ConnectionClosed):
                async for message in replica:
                    await self._pass(message)
            if replica.close_code in FINAL:
                await self._send({"type": "websocket.close", "code": replica.close_code, "reason": ""})
                return
            async with self._lock:
                try:
                    self._replica = await self._connect()
                except (_Refused, TimeoutError):
                    await self._send({"type": "websocket.close", "code": 1012, "reason": ""})
                    return
                await self._ask_again()

    async def _ask_again(self) -> None:
        """Send the newest message without an answer again; answer the older ones `superseded`."""
        *older, newest = self._unanswered or [(None, b"")]
        self._unanswered = self._unanswered[-1:]
        for name, _ in older:
            await self._send({"type": "websocket.send", "text": json.dumps({"type": "superseded", "id": name})})
        if self._unanswered:
            with suppress(ConnectionClosed):
                await self._here().send(newest[1])

    async def _pass(self, message: Sent) -> None:
        answer: Any = json.loads(message) if isinstance(message, str) else unpack(message)[0]
        if answer["type"] == "ready":
            if self._ready_sent:
                return
            self._ready_sent = True
        else:
            name = answer["id"]
            index = next((i for i, (one, _) in enumerate(self._unanswered) if one == name), None)
            if index is not None:
                del self._unanswered[index]
        kind = "text" if isinstance(message, str) else "bytes"
        await self._send({"type": "websocket.send", kind: message})

    def _here(self) -> ClientConnection:
        assert self._replica is not None
        return self._replica


def _id_in(message: Sent, most: int) -> int | None:
    """The id that a replica will read in a message."""
    try:
        return id_in(read_message(message, most)[0])
    except ApiError:
        return None
