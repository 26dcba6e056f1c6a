"""A live connection through the front: the client's side stays while the replica's changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Origin, Subprotocol

from onestill.serve.web.errors import ApiError
from onestill.serve.web.realtime import name_in, opened, unpacked

if TYPE_CHECKING:
    from onestill.serve.cluster.proxy import Front

__all__ = ["Socket", "tries"]

LONGEST_PAUSE_S = 1.0
LARGEST = 2**25  # of an answer: four pictures of a large model
FINAL = (1000, 1003, 1007, 1008, 1009, 1013)  # a replica means it; with any other code it went
OPEN_S = 20.0
# Made anew on each connection.
OWN = {b"host", b"origin"}
HANDSHAKE = (b"sec-websocket", b"connection", b"upgrade")
Sent = str | bytes


class _Refused(Exception):
    """A replica wants no such socket."""


class Socket:
    """One client's; see the module."""

    def __init__(self, front: Front, scope: Scope, receive: Receive, send: Send) -> None:
        self._front, self._scope, self._receive, self._send = front, scope, receive, send
        self._replica: ClientConnection | None = None
        self._unanswered: list[tuple[int | None, Sent]] = []
        self._lock = asyncio.Lock()  # held while something goes to a replica, or another one is looked for
        self._greeted = False

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
        """A replica's socket. Raises _Refused; TimeoutError where there is none."""
        headers = self._front.headers(self._scope)
        more = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in headers
            if name not in OWN and not name.startswith(HANDSHAKE)
        ]
        named = dict(self._scope["headers"])
        origin = named.get(b"origin")
        async for _ in tries(self._front.patience_s):
            try:
                return await connect(
                    # The Host is the one that the client sent, as replicas check it too.
                    f"ws://{named.get(b'host', b'localhost').decode('latin-1')}{self._scope['path']}",
                    host=self._front.host,
                    port=self._front.port,
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
        """From the client to the replica of the moment."""
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            data: Sent = text if text is not None else message.get("bytes") or b""
            async with self._lock:
                self._unanswered.append((_id_in(data, self._front.message_bytes), data))
                with suppress(ConnectionClosed):  # then it is asked again of another
                    await self._here().send(data)

    async def _down(self) -> None:
        """From one replica after another to the client."""
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
        """The newest of what was not answered; the others are told that it took their place."""
        *older, newest = self._unanswered or [(None, b"")]
        self._unanswered = self._unanswered[-1:]
        for name, _ in older:
            await self._send({"type": "websocket.send", "text": json.dumps({"type": "superseded", "id": name})})
        if self._unanswered:
            with suppress(ConnectionClosed):
                await self._here().send(newest[1])

    async def _pass(self, message: Sent) -> None:
        answer: Any = json.loads(message) if isinstance(message, str) else unpacked(message)[0]
        if answer["type"] == "ready":
            if self._greeted:
                return
            self._greeted = True
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


async def tries(patience_s: float) -> AsyncIterator[int]:
    """Numbers, after ever longer pauses, until the time is up."""
    ended = time.monotonic() + patience_s
    number, pause = 0, 0.02
    while True:
        yield number
        if time.monotonic() + pause > ended:
            return
        await asyncio.sleep(pause)
        number, pause = number + 1, min(LONGEST_PAUSE_S, pause * 2)


def _id_in(message: Sent, most: int) -> int | None:
    """What the answer to a message will be named, as the replica reads it."""
    try:
        return name_in(opened(message, most)[0])
    except ApiError:
        return None
