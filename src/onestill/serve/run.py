"""Runs a server in uvicorn, with time limits that uvicorn lacks, and shuts it down in order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from onestill.errors import OnestillError
from onestill.serve.access.quota import network
from onestill.serve.connections import Connections
from onestill.serve.forwarded import FromProxies, TrustedProxies
from onestill.serve.paced import PacedHttp, PacedSocket
from onestill.serve.process import tune_interpreter
from onestill.serve.web.app import create_app
from onestill.serve.web.server import Server

__all__ = ["ENGINE_LOST", "ProxySettings", "listen", "make_proxy_server", "make_server", "run"]

HEADERS_S = 10.0  # a new connection is closed where no whole request has begun by then
KEEP_ALIVE_S = 30  # after an answer a connection may be silent for so long, and then has HEADERS_S for its next request
CONNECTIONS, CONNECTIONS_EACH = 2000, 500  # in all, and of one address
OTHER_FILES = 150  # that a server has open beside its connections
# At shutdown: seconds for the queue to drain, then for uvicorn's connections. The process ends within ten seconds.
DRAIN_S = 5.0
GRACE_S = 7
LATE_S = 0.2  # between two looks at connections that are accepted meanwhile
LEAVE_S = 9.0  # then the process ends, whatever still runs
ANSWER_S = 0.5  # for the last answers of a server whose engine was given up
TWICE_S = 0.5  # within that a second Ctrl-C is the first one: a terminal sends it to the supervisor and to the server
ENGINE_LOST = 70  # the exit status of a server whose engine was given up, so that it is started again


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
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Then finish what runs, answer or close the rest, and return within ten seconds.

    Where the engine hangs, or fails for good, the process ends with the status ENGINE_LOST.

    Args:
        server: closed at the end.
        bound: a socket from `listen`.
        proxy: what stands before it; None is nothing.
        metrics: another socket, whose connections find metrics, as those to `bound` then do not.
        ready: called when the server accepts connections.
        beat: called each second, while the event loop runs.
    """
    _allow_connections()
    tune_interpreter()
    port = None if metrics is None else int(metrics.getsockname()[1])
    running = _server(server, proxy, port, ready, beat, owns_process=True)
    server.scheduler.on_lost = running.lose_engine
    running.run(sockets=[bound] if metrics is None else [bound, metrics])
    if running.status or not server.scheduler.close():  # a thread that hangs in an engine would keep the process
        _leave(running.status)


def make_server(
    server: Server,
    proxy: ProxySettings | None = None,
    metrics_port: int | None = None,
    ready: Callable[[], None] | None = None,
) -> uvicorn.Server:
    """The uvicorn server that `run` runs. Another thread ends it by setting `should_exit`."""
    return _server(server, proxy, metrics_port, ready)


def _server(
    server: Server,
    proxy: ProxySettings | None,
    metrics_port: int | None,
    ready: Callable[[], None] | None,
    beat: Callable[[], None] = lambda: None,
    *,
    owns_process: bool = False,
) -> _DrainingServer:
    config = _config(create_app(server, metrics_port), server.bounds.message, proxy, lifespan="on")
    drain = partial(server.drain, DRAIN_S)
    return _DrainingServer(config, drain, ready, beat, owns_process=owns_process)


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
    connections = Connections(CONNECTIONS_EACH, _allow_connections())
    http: Any = partial(_BoundedHttp, connections, proxy.trusted)
    socket_protocol: Any = partial(_BoundedSocket, connections)
    return uvicorn.Config(
        FromProxies(app, proxy.trusted, proxy.root_path),
        http=http,
        ws=socket_protocol,
        ws_max_size=message_bytes + 1024,
        ws_max_queue=32,
        ws_per_message_deflate=False,  # pictures are compressed already
        lifespan=lifespan,
        log_config=None,
        log_level="error",  # a client's mistakes are answered, not logged
        access_log=False,  # addresses and their requests are private by default
        server_header=False,
        proxy_headers=False,  # FromProxies reads them
        limit_concurrency=CONNECTIONS + OTHER_FILES,  # never reached, as `Connections` makes room before
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )


def _allow_connections() -> int:
    """Raise the limit of open files to what CONNECTIONS needs; returns how many fit where the system allows fewer."""
    if sys.platform == "win32":  # Windows has no such limit
        return CONNECTIONS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, soft - OTHER_FILES))


class _BoundedHttp(PacedHttp):
    """uvicorn's protocol with what it lacks: time limits for a request's headers and for the next request, and a share
    of the connections for each address.
    """

    def __init__(self, shares: Connections, proxies: TrustedProxies, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._shares, self._proxies = shares, proxies

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        peer = self.client[0] if self.client else ""
        address = "" if not peer or self._proxies.trusts(peer) else network(peer)
        self._shares.open(self.transport, address)
        self._silence = self.loop.call_later(HEADERS_S, self._close_if_silent, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._silence.cancel()
        self._shares.close(self.transport)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if not getattr(self.cycle, "response_complete", True):
            self._shares.busy(self.transport)

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._shares.busy(self.transport)
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        # uvicorn's own timer ends with the first byte of the next request.
        self._silence.cancel()
        self._silence = self.loop.call_later(KEEP_ALIVE_S + HEADERS_S, self._close_if_silent, self.cycle)
        self._shares.idle(self.transport)
        super().on_response_complete()

    def _close_if_silent(self, answered: RequestResponseCycle | None) -> None:
        """Close the connection if its next request after `answered`, or its first, has not come."""
        is_ours = not self.transport.is_closing() and self.transport.get_protocol() is self
        if is_ours and self.cycle is answered:
            self.transport.close()


class _BoundedSocket(PacedSocket):
    """uvicorn's protocol of sockets; it has a share of the connections until it ends."""

    def __init__(self, shares: Connections, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._shares = shares

    def connection_lost(self, exc: Exception | None) -> None:
        self._shares.close(self.transport)
        super().connection_lost(exc)


class _DrainingServer(uvicorn.Server):
    """uvicorn's server that drains the queue first, and ends with status 0 on SIGTERM.

    Args:
        config: uvicorn's.
        drain: called at the end, in a thread.
        ready, beat: see `run`.
        owns_process: whether the process may be ended where something keeps it.

    Attributes:
        status: the exit status of the process.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], object],
        ready: Callable[[], None] | None,
        beat: Callable[[], None] = lambda: None,
        *,
        owns_process: bool = False,
    ) -> None:
        super().__init__(config)
        self.status = 0
        self._drain, self._ready, self._beat = drain, ready, beat
        self._owns_process = owns_process
        self._interrupted = float("-inf")

    def lose_engine(self) -> None:
        """End soon, with the status ENGINE_LOST; called from any thread once every request is answered."""
        self.status = ENGINE_LOST
        _later(ANSWER_S, setattr, self, "should_exit", True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        now = time.monotonic()
        if sig != signal.SIGINT or now - self._interrupted > TWICE_S:
            super().handle_exit(sig, frame)
        if sig == signal.SIGINT:
            self._interrupted = now

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # ten ticks are a second
            self._beat()
        return await super().on_tick(counter)

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
        if self._owns_process:
            _later(LEAVE_S, _leave, self.status)
        draining = asyncio.get_running_loop().run_in_executor(None, self._drain)
        late = asyncio.create_task(self._close_late())
        await super().shutdown(sockets)
        late.cancel()
        await draining

    async def _close_late(self) -> None:
        """Close the connections that were accepted after uvicorn had closed all others."""
        while True:
            await asyncio.sleep(LATE_S)
            for connection in list(self.server_state.connections):
                if not connection.transport.is_closing():
                    connection.shutdown()


def _later(seconds: float, call: Callable[..., object], *arguments: object) -> None:
    """Call in a thread that keeps no process."""
    timer = threading.Timer(seconds, call, arguments)
    timer.daemon = True
    timer.start()


def _leave(status: int) -> None:
    """End the process, whatever its other threads do."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
