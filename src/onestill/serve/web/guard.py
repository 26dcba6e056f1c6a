"""Checks on every connection before any route: its Host, its Origin, and the size and speed of its body.

A page of another site can make a browser send requests here; by DNS rebinding they even look local. So a Host must be a
name of this server (an IP address cannot be rebound), and an Origin must belong to the Host or be allowed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onestill.serve.errors import ApiError
from onestill.serve.web.errors import response_of, to_api_error

__all__ = ["Guard"]

BODY_S = 30.0  # a body must have arrived by then
SAFE = ("GET", "HEAD", "OPTIONS")
ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
}

# For pages of allowed origins. They may not send cookies: such a visitor is known by key or address.
PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, DELETE",
    "access-control-allow-headers": "Authorization, Content-Type, *",  # the star does not mean Authorization
    "access-control-max-age": "600",
}
SHARED = {
    "access-control-expose-headers": "Retry-After, X-Request-Id, "
    + ", ".join(f"X-RateLimit-{part}-Requests" for part in ("Limit", "Remaining", "Reset")),
    "cross-origin-resource-policy": "cross-origin",
}

Watch = Callable[[str, str, int, float], None]


class Guard:
    """ASGI middleware that refuses what the module describes, and adds headers to every answer.

    Args:
        app: the application behind it.
        hosts: names of this server, besides localhost and IP addresses; "*" allows any.
        origins: other sites whose pages may send requests, such as "https://example.org".
        most_body: bytes that a body may have.
        watch: called with (method, path of the route, status, seconds) when an HTTP request is answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Iterable[str],
        origins: Iterable[str],
        most_body: int,
        watch: Watch = lambda method, route, status, seconds: None,
    ) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts} | {"localhost"}
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._most_body = most_body
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if scope["type"] == "websocket":
            if refusal is not None:
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": str(refusal)[:120]})
                return
            await self._app(scope, receive, send)
            return
        await self._http(scope, receive, send, refusal)

    async def _http(self, scope: Scope, receive: Receive, send: Send, refusal: ApiError | None) -> None:
        started = time.perf_counter()
        answered = False
        request_id = secrets.token_hex(8)
        asked = Headers(scope=scope)
        origin = asked.get("origin")
        listed = origin if origin is not None and self._is_listed(origin) else None

        async def send_with_headers(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                headers = MutableHeaders(scope=message)
                if listed is not None:
                    headers.update(SHARED | {"access-control-allow-origin": listed})
                if self._origins:
                    headers.add_vary_header("Origin")
                for name, value in ALWAYS.items():
                    headers.setdefault(name, value)
                took = time.perf_counter() - started
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round(took * 1000))
                route = getattr(scope.get("route"), "path", "other")
                self._watch(scope["method"], route, message["status"], took)
            await send(message)

        try:
            if refusal is not None:
                raise refusal
            if listed is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in asked:
                await Response(status_code=204, headers=PREFLIGHT)(scope, receive, send_with_headers)
                return
            await self._app(scope, self._bounded(scope, receive), send_with_headers)
        except ClientDisconnect:
            return
        except Exception as error:  # whatever a route raises, the answer gets these headers and is counted
            if answered:
                raise
            response = response_of(to_api_error(error))
            response.headers["connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_known(host):
            return ApiError(403, "The Host is not a name of this server; allow it with --allow-host.", "unknown_host")
        origin = headers.get("origin")
        if origin is None or (scope["type"] == "http" and scope["method"] in SAFE):
            return None
        if self._is_listed(origin):
            return None
        with suppress(ValueError):  # an Origin that is none is foreign
            if urlsplit(origin).netloc.lower() == host.lower():
                return None
        return ApiError(
            403, "Pages of this Origin may not send requests; allow it with --allow-origin.", "foreign_origin"
        )

    def _is_listed(self, origin: str) -> bool:
        return origin.lower().rstrip("/") in self._origins

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if not name or any(letter in host for letter in "@/\\?# "):
            return False
        if "*" in self._hosts or name.lower() in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that raises ApiError for a body that is too large or too slow."""
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._most_body:
            return _raising(self._too_large())
        total = 0
        ended = False
        due = time.monotonic() + BODY_S

        async def bounded() -> Message:
            nonlocal total, ended
            if ended:  # what still comes only says that the client has gone
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, due - time.monotonic()))
            except TimeoutError as error:
                raise ApiError(408, f"The body took longer than {BODY_S:.0f} seconds.", "too_slow") from error
            total += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if total > self._most_body:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is too large; send at most {self._most_body // 2**20} MB.", "too_large")


def _raising(error: ApiError) -> Callable[[], Awaitable[Message]]:
    async def receive() -> Message:
        raise error

    return receive
