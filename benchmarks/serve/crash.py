"""kill -9 under load, then SIGTERM under load: `python -m benchmarks.serve.crash`.

Clients with a key and a daily limit draw as fast as they can; the server is killed in the middle and started again on
the same database. Every picture that arrived must have been counted, and nothing may be counted that was not asked for.
"""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

from benchmarks.serve.server import Process, running, tell
from onestill.serve.ledger import Ledger

CLIENTS = 6


class Hammer:
    """Threads that draw with one key until the server is gone, and count what they asked for and got."""

    def __init__(self, process: Process, key: str) -> None:
        self.arrived = self.asked = 0
        self.statuses: list[int] = []
        self._lock = threading.Lock()
        self._process, self._headers = process, {"authorization": f"Bearer {key}"}
        self.threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                self.asked += 1
            try:
                self._process.draw(self._headers, seed=1)
            except urllib.error.HTTPError as error:
                with self._lock:
                    self.statuses.append(error.code)
                    self.asked -= 1  # refused, so not drawn
                if error.code == 503:
                    return
                continue
            except (OSError, ValueError):
                return
            with self._lock:
                self.arrived += 1

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)


def rounds(url: str, times: int, seconds: float, options: list[str]) -> dict[str, Any]:
    """Kill the server `times` times; returns what arrived, what was asked for and what was counted."""
    ledger = Ledger(url)
    key_id, key = ledger.add_key("crash", 1_000_000)
    arrived = asked = 0
    for _ in range(times):
        with running([*options, "--database", url]) as process:
            hammer = Hammer(process, key)
            time.sleep(seconds)
            process.stop(signal.SIGKILL)
            hammer.join()
        arrived += hammer.arrived
        asked += hammer.asked
    rows = {row["id"]: row for row in ledger.list_keys()}
    with running([*options, "--database", url]) as process:
        hammer = Hammer(process, key)
        time.sleep(seconds)
        status, took = process.stop(signal.SIGTERM)
        hammer.join()
        errors = process.errors()
    counted = rows[key_id]["today"]
    ledger.close()
    return {
        "kills": times,
        "pictures_arrived": arrived,
        "pictures_counted": counted,
        "requests_under_way_at_a_kill": asked - arrived,
        "keys_lost": key_id not in rows,
        "ok": arrived <= counted <= asked,
        "sigterm": {
            "status": status,
            "seconds": round(took, 2),
            "arrived": hammer.arrived,
            "refusals": sorted(set(hammer.statuses)),
            "errors": errors[-500:],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = rounds(f"sqlite:///{folder}/serve.db", options.times, options.seconds, [])
    tell(report, options.out)


if __name__ == "__main__":
    main()
