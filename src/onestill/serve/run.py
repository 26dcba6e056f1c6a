"""Runs a server in uvicorn, with time limits that uvicorn lacks, and shuts it down in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from onestill.errors import OnestillError
from onestill.serve.forwarded import FromProxies, TrustedProxies
from onestill.serve.logs import log_to_stderr
from onestill.serve.paced import PacedHttp, PacedSocket
from onestill.serve.process import tune_interpreter
from onestill.serve.web.app import create_app
from onestill.serve.web.server import Server

__all__ = ["ProxySettings", "listen", "make_proxy_server", "make_server", "run"]

HEADERS_S = 10.0  # a new connection is closed where no whole request has begun by then
KEEP_ALIVE_S = 30  # after an answer a connection may be silent for so long, and then has HEADERS_S for its next request
CONNECTIONS = 2000
# At shutdown: seconds for the queue to drain, then for uvicorn's connections. The process ends within ten seconds.
DRAIN_S = 5.0
GRACE_S = 7


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        OnestillError: the address is not this machine's, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise OnestillError(
            f"The server cannot listen at {host}, port {port} ({getattr(error, 'strerror', None) or error}); "
            "choose another --port or --host."
        ) from error
    bound.setblocking(False)
    return bound


@dataclass(frozen=True)
class ProxySettings:
    """The proxy before a server.

    Attributes:
        trusted: whose headers about a client are believed.
        root_path: the path below which the proxy has the server, such as "/draw"; see `FromProxies`.
    """

    trusted: TrustedProxies = field(default_factory=lambda: TrustedProxies(None))
    root_path: str = ""


def run(
    server: Server,
    bound: socket.socket,
    proxy: ProxySettings | None = None,
    *,
    metrics: socket.socket | None = None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Then finish what runs, answer or close the rest, and return within ten seconds.

    Args:
        server: closed at the end.
        bound: a socket from `listen`.
        proxy: what stands before it; None is nothing.
        metrics: another socket, whose connections find metrics, as those to `bound` then do not.
        ready: called when the server accepts connections.
    """
    log_to_stderr(server.settings.log_format, server.settings.log_level)
    _allow_connections()
    tune_interpreter()
    port = None if metrics is None else int(metrics.getsockname()[1])
    make_server(server, proxy, port, ready).run(sockets=[bound] if metrics is None else [bound, metrics])


def make_server(
    server: Server,
    proxy: ProxySettings | None = None,
    metrics_port: int | None = None,
    ready: Callable[[], None] | None = None,
) -> uvicorn.Server:
    """The uvicorn server that `run` runs. Another thread ends it by setting `should_exit`."""
    config = _config(create_app(server, metrics_port), server.bounds.message, proxy, lifespan="on")
    return _DrainingServer(config, lambda: server.scheduler.close(DRAIN_S), ready)


def make_proxy_server(
    app: ASGIApp, message_bytes: int, proxy: ProxySettings | None = None, ready: Callable[[], None] | None = None
) -> uvicorn.Server:
    """As `make_server`, for a proxy before servers. It has no scheduler to drain."""
    _allow_connections()
    return _DrainingServer(_config(app, message_bytes, proxy, lifespan="off"), lambda: None, ready)


def _config(
    app: ASGIApp, message_bytes: int, proxy: ProxySettings | None, lifespan: Literal["on", "off"]
) -> uvicorn.Config:
    proxy = proxy or ProxySettings()
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    return uvicorn.Config(
        FromProxies(app, proxy.trusted, proxy.root_path),
        http=_BoundedHttp,
        ws=PacedSocket,
        ws_max_size=message_bytes + 1024,
        ws_max_queue=32,
        ws_per_message_deflate=False,  # pictures are compressed already
        lifespan=lifespan,
        log_config=None,
        log_level="error",  # a client's mistakes are answered, not logged
        access_log=False,  # addresses and their requests are private by default
        server_header=False,
        proxy_headers=False,  # FromProxies reads them
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )


def _allow_connections() -> None:
    """Raise the limit of open files to what CONNECTIONS needs, as far as the system allows."""
    if sys.platform == "win32":  # Windows has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + 200
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _BoundedHttp(PacedHttp):
    """uvicorn's protocol with two time limits that it lacks: for a request's headers, and for the next request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._silence = self.loop.call_later(HEADERS_S, self._close_if_silent, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._silence.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        # uvicorn's own timer ends with the first byte of the next request.
        self._silence.cancel()
        self._silence = self.loop.call_later(KEEP_ALIVE_S + HEADERS_S, self._close_if_silent, self.cycle)
        super().on_response_complete()

    def _close_if_silent(self, answered: RequestResponseCycle | None) -> None:
        """Close the connection if its next request after `answered`, or its first, has not come."""
        is_ours = not self.transport.is_closing() and self.transport.get_protocol() is self
        if is_ours and self.cycle is answered:
            self.transport.close()


class _DrainingServer(uvicorn.Server):
    """uvicorn's server that drains the queue first, and ends with status 0 on SIGTERM."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None], ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._drain = drain
        self._ready = ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but does not raise the signal again after the shutdown, so the exit status is 0."""
        names = (signal.SIGINT, signal.SIGTERM)
        try:
            before = {name: signal.signal(name, self.handle_exit) for name in names}
        except ValueError:  # not in the main thread, where signals do not arrive
            before = {}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None and not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("onestill.serve").info("Closing.")
        draining = asyncio.get_running_loop().run_in_executor(None, self._drain)
        await super().shutdown(sockets)
        await draining
