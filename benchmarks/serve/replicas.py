"""Two replicas serve the load and one is killed: `python -m benchmarks.serve.replicas ray|proxy --out FILE`.

`ray` is `onestill serve --ray 2`; `proxy` two servers, PostgreSQL and nginx as `deploy/` has them. No client asks for
anything twice: a request that is accepted must be answered. Behind the proxy before Ray sockets stay open; nginx
closes those of the server that died, and their typists connect anew, as the page does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serve.crowd import Crowd
from benchmarks.serve.server import running, tell
from onestill.serve.access.ledger import Ledger

KEY_LIMIT = 1_000_000


@contextmanager
def ray(options: list[str]) -> Iterator[dict[str, Any]]:
    """Ray's replicas: `url`, `headers`, `kill`, `end`."""
    with running([*options, "--ray", "2"]) as process:
        yield {
            "url": process.url,
            "headers": {},
            "kill": lambda: os.kill(replica_ids(process.process.pid)[0], signal.SIGKILL),
            "end": lambda: process.stop(signal.SIGTERM, 60)[0],
        }


def replica_ids(of: int) -> list[int]:
    """The processes of Ray's replicas that a process started."""
    import psutil

    found = []
    for one in psutil.Process(of).children(recursive=True):
        try:
            if "ServeReplica:onestill" in " ".join(one.cmdline()):
                found.append(one.pid)
        except psutil.Error:
            continue
    return found


@contextmanager
def proxy(options: list[str]) -> Iterator[dict[str, Any]]:
    """Two servers behind nginx: as `ray`, and `counted`."""
    from tests.serve.nginx import nginx
    from tests.serve.postgres import postgres

    with ExitStack() as opened:
        database = opened.enter_context(postgres())
        ledger = Ledger(database)
        opened.callback(ledger.close)
        key_id, key = ledger.add_key("load", KEY_LIMIT)
        more = [*options, "--database", database, "--trust-proxy", "127.0.0.1"]
        servers = [opened.enter_context(running(more)) for _ in range(2)]
        port = opened.enter_context(nginx(*(f"{one.host}:{one.port}" for one in servers)))
        yield {
            "url": f"http://127.0.0.1:{port}",
            "headers": {"authorization": f"Bearer {key}"},
            "kill": lambda: servers[0].stop(signal.SIGKILL),
            "end": lambda: servers[1].stop(signal.SIGTERM)[0],
            "counted": lambda: {row["id"]: row for row in ledger.list_keys()}[key_id]["today"],
        }


async def load(stack: dict[str, Any], typists: int, clients: int, seconds: float) -> Crowd:
    """The crowd for so long, a replica killed after a third of it."""
    crowd = Crowd(stack["url"], typists, 8.0, clients, stack["headers"])

    async def kill() -> None:
        await asyncio.sleep(seconds / 3)
        await asyncio.to_thread(stack["kill"])

    await asyncio.gather(crowd.run(time.monotonic() + seconds, again=True), kill())
    return crowd


def measured(kind: str, options: list[str], typists: int, clients: int, seconds: float) -> dict[str, Any]:
    """The report of one kind."""
    with {"ray": ray, "proxy": proxy}[kind](options) as stack:
        crowd = asyncio.run(load(stack, typists, clients, seconds))
        report = crowd.report()
        counted = stack["counted"]() if "counted" in stack else None
        status = stack["end"]()
    asked = {
        "every API request answered with 200": set(report["api_statuses"]) == {"200"},
        "the page stays up": set(report["page_statuses"]) == {"200"},
        "every id answered once, or its socket closed": report["ids"]
        == report["ids_answered_once"] + report["ids_cut_off"],
        "no picture after a newer one": report["stale_pictures"] == 0,
        "exit status 0": status == 0,
    }
    if kind == "ray":
        asked["no socket was closed"] = report["sockets_cut"] == 0
    if counted is not None:
        # A request that is asked again may have been counted by the server that died, too.
        asked["every picture counted"] = crowd.arrived <= counted <= crowd.asked + clients + typists
    return {"asked": asked, "kind": kind, "seconds": seconds, "pictures_counted": counted, **report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["ray", "proxy"])
    parser.add_argument("--typists", type=int, default=16)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    more = ["--model", options.model, "--threads", "1"]
    tell(measured(options.kind, more, options.typists, options.clients, options.seconds), options.out)


if __name__ == "__main__":
    main()
