"""kill -9 in the middle of the load, then SIGTERM: `python -m benchmarks.serve.crash --out FILE`.

Typists and API clients draw with a key that has a daily limit; the server is killed in the middle and started again on
the same database. Every picture that arrived must have been counted, and nothing may be counted that was not asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.serve.crowd import Crowd
from benchmarks.serve.server import Process, running, tell
from onestill.serve.access.ledger import Ledger

LIMIT = 1_000_000


async def ended(crowd: Crowd, process: Process, seconds: float, name: int) -> tuple[int, float]:
    """Let the crowd ask for so long, send the signal, wait for everyone's end; the status and the time to it."""

    async def end() -> tuple[int, float]:
        await asyncio.sleep(seconds)
        return await asyncio.to_thread(process.stop, name)

    _, found = await asyncio.gather(crowd.run(time.monotonic() + seconds + 30), end())
    return found


def rounds(
    url: str, times: int, seconds: float, options: list[str], typists: int = 16, clients: int = 8
) -> dict[str, Any]:
    """Kill the server `times` times; returns what arrived, what was asked for and what was counted."""
    ledger = Ledger(url)
    key_id, key = ledger.add_key("crash", LIMIT)
    headers = {"authorization": f"Bearer {key}"}
    arrived = asked = 0
    for _ in range(times):
        with running([*options, "--database", url]) as process:
            crowd = Crowd(process.url, typists, 8.0, clients, headers)
            asyncio.run(ended(crowd, process, seconds, signal.SIGKILL))
        arrived += crowd.arrived
        asked += crowd.asked
    counted = {row["id"]: row for row in ledger.list_keys()}.get(key_id, {"today": 0})["today"]
    with running([*options, "--database", url]) as process:
        last = Crowd(process.url, typists, 8.0, clients, headers)
        status, took = asyncio.run(ended(last, process, seconds, signal.SIGTERM))
        errors = process.errors()
    rows = {row["id"]: row for row in ledger.list_keys()}
    ledger.close()
    return {
        "typists": typists,
        "api_clients": clients,
        "kills": times,
        "pictures_arrived": arrived,
        "pictures_counted": counted,
        "under_way_at_a_kill": asked - arrived,
        "keys_lost": key_id not in rows,
        "ok": arrived <= counted <= asked and arrived > 0,
        "sigterm": {
            "status": status,
            "seconds": round(took, 2),
            "arrived": last.arrived,
            "api_statuses": dict(last.statuses),
            "counted": rows[key_id]["today"] - counted if key_id in rows else None,
            "errors": errors[-500:],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/serve.db"
        report = rounds(url, options.times, options.seconds, ["--model", options.model])
    tell(report, options.out)


if __name__ == "__main__":
    main()
