"""Several replicas of one server under Ray Serve, on one machine or many. Needs `[ray]`.

Each replica is the whole server with its own model and scheduler; they share the database. Ray's proxy sends a request
to the replica with the fewest. Ours stands before it and sends again what a replica had when it died.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from onestill.errors import OnestillError, require
from onestill.serve.cluster.proxy import Proxy
from onestill.serve.cluster.upstream import ClientFromProxy, Upstream
from onestill.serve.logs import log_to_stderr
from onestill.serve.process import tune_interpreter
from onestill.serve.run import ProxySettings, listen, make_proxy_server
from onestill.serve.web.app import create_app
from onestill.serve.web.guard import Guard
from onestill.serve.web.server import Server, Settings

__all__ = ["run_on_ray"]

NAME = "onestill"
DRAIN_S = 4.0  # for a replica to finish what it has accepted

_servers: list[Server] = []  # of this process, when it is a replica


def run_on_ray(
    build: Callable[[], Server],
    settings: Settings,
    bound: socket.socket,
    *,
    replicas: int,
    gpus: float,
    proxy: ProxySettings,
    ready: Callable[[], None],
) -> None:
    """Deploy and serve until SIGTERM or Ctrl-C; then drain the replicas and take them down.

    Joins the Ray cluster that `RAY_ADDRESS` names, else starts one on this machine, without its dashboard.

    Args:
        build: makes a replica's server, in the replica's process; it must be picklable.
        settings: of each replica; its bounds limit how much a replica is sent at once.
        bound: from `listen`; our proxy answers there, and passes on to Ray's proxy on the cluster's head.
        replicas: how many.
        gpus: of each, such as 0.5; 0 for none.
        proxy: as for `run`.
        ready: called when all replicas answer.

    Raises:
        OnestillError: Ray is not installed, or a replica does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = require("ray", "ray")
    serve: Any = require("ray.serve", "ray")
    joins = "RAY_ADDRESS" in os.environ
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    try:
        ray.init(include_dashboard=None if joins else False, log_to_driver=False)
        # After Ray, which has handlers of its own that end the process at once.
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, stop)
        host = ray.get_runtime_context().gcs_address.rpartition(":")[0] if joins else "127.0.0.1"
        port = _free_port()
        proof = secrets.token_hex(32)
        serve.start(http_options={"host": "0.0.0.0" if joins else host, "port": port})
        try:
            serve.run(_deployment(serve, build, settings, replicas, gpus, proof), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise OnestillError("Ray could not start the replicas; see 'ray status' and Ray's logs.") from error
        app = _proxy(Upstream(host, port, proof, settings.bounds.message), settings)
        make_proxy_server(app, settings.bounds.message, proxy, ready).run([bound])
    except KeyboardInterrupt:
        if not stopped:
            raise
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def _proxy(upstream: Upstream, settings: Settings) -> Guard:
    return Guard(Proxy(upstream), settings.hosts, settings.origins, settings.bounds.body)


def _free_port() -> int:
    with listen("127.0.0.1", 0) as found:
        return int(found.getsockname()[1])


def _deployment(
    serve: Any, build: Callable[[], Server], settings: Settings, replicas: int, gpus: float, proof: str
) -> Any:
    def app() -> FastAPI:
        log_to_stderr(settings.log_format, settings.log_level)
        server = build()
        _servers.append(server)
        made = create_app(server)
        made.add_middleware(ClientFromProxy, proof=proof)
        tune_interpreter()
        return made

    class Replica:
        def check_health(self) -> None:
            """Raise where only a new replica helps; Ray then replaces this one."""
            for server in _servers:
                reason = server.scheduler.why_dead()
                if reason is not None:
                    raise RuntimeError(reason)

    options = {
        "name": NAME,
        "num_replicas": replicas,
        # A socket is an ongoing request for as long as it is open.
        "max_ongoing_requests": settings.bounds.live + settings.limits.waiting,
        "max_queued_requests": settings.limits.waiting,
        "graceful_shutdown_timeout_s": DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2,
        "ray_actor_options": {"num_cpus": 1 / replicas, "num_gpus": gpus},
    }
    return serve.deployment(**options)(serve.ingress(app)(Replica)).bind()
