"""What stands behind the proxy: where the replicas answer, and what they are sent beside a client's own headers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["HOP_BY_HOP", "ClientFromProxy", "Upstream", "retries"]

LONGEST_PAUSE_S = 1.0
# Headers of one connection, which are not passed on. So is the length of a body, which is written anew.
HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"expect"}
PROOF, CLIENT = b"x-onestill-front", b"x-onestill-client"
SCHEME, ROOT_PATH = b"x-onestill-scheme", b"x-onestill-root-path"


@dataclass(frozen=True)
class Upstream:
    """The replicas, behind one address.

    Attributes:
        host, port: where they answer; which of them does is decided there.
        proof: a secret by which `ClientFromProxy` knows the proxy.
        message_bytes: of one live message, as the replicas are bound.
        patience_s: how long another replica is looked for; starting one takes less.
    """

    host: str
    port: int
    proof: str = field(repr=False)
    message_bytes: int
    patience_s: float = 60.0

    def headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The headers that go to a replica: the client's, and what `FromProxies` found out about the client."""
        client = scope["client"][0] if scope.get("client") else ""
        ours = {CLIENT: client, SCHEME: scope["scheme"], ROOT_PATH: scope.get("root_path", ""), PROOF: self.proof}
        dropped = HOP_BY_HOP | {b"content-length", *ours}
        headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
        return [*headers, *((name, value.encode()) for name, value in ours.items())]


class ClientFromProxy:
    """ASGI middleware of a replica: the client's address and scheme and the root path are those that the proxy names.

    Args:
        app: the replica's application.
        proof: the proxy's; requests without it keep their own.
    """

    def __init__(self, app: ASGIApp, proof: str) -> None:
        self._app, self._proof = app, proof

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on."""
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            if secrets.compare_digest(headers.get(PROOF.decode(), "").encode(), self._proof.encode()):
                client, scheme, root_path = (headers.get(name.decode(), "") for name in (CLIENT, SCHEME, ROOT_PATH))
                scope = {**scope, "client": (client, 0), "scheme": scheme, "root_path": root_path}
        await self._app(scope, receive, send)


async def retries(patience_s: float) -> AsyncIterator[int]:
    """The numbers of tries, each after a longer pause, until the time is up."""
    ended = time.monotonic() + patience_s
    number, pause = 0, 0.02
    while True:
        yield number
        if time.monotonic() + pause > ended:
            return
        await asyncio.sleep(pause)
        number, pause = number + 1, min(LONGEST_PAUSE_S, pause * 2)
