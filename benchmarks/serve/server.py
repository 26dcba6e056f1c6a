"""A server in a process of its own, and how the benchmarks ask it. Everything stays on the loopback address."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 300


class Process:
    """`onestill serve` with these options, on a free port."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "onestill", "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()  # the child prints it when it accepts connections, or ends
        found = re.search(r"http://([\d.]+):(\d+)/", self.line)
        if found is None:
            raise RuntimeError(f"the server did not start: {self.line}{self.errors()}")
        self.host, self.port = found[1], int(found[2])
        self.url = f"http://{self.host}:{self.port}"
        self.socket_url = f"ws://{self.host}:{self.port}/v1/realtime"

    @property
    def pid(self) -> int:
        """The server's own process: on Linux the one that the command's process supervises."""
        own = self.process.pid
        try:
            children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        except OSError:
            return own
        return int(children[0]) if children else own

    def errors(self) -> str:
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def metrics(self) -> dict[str, float]:
        """Every figure of /metrics, by its name with labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def draw(self, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/v1/images/generations",
            json.dumps({"prompt": "a red apple", **fields}).encode(),
            {"content-type": "application/json", **(headers or {})},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def stop(self, name: int = signal.SIGTERM, wait_s: float = 30) -> tuple[int, float]:
        """Send a signal; returns the exit status and the seconds until then."""
        started = time.monotonic()
        self.process.send_signal(name)
        status = self.process.wait(wait_s)
        return status, time.monotonic() - started


@contextmanager
def running(options: Sequence[str] = ()) -> Iterator[Process]:
    found = Process(options)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.stop(signal.SIGKILL)
        if found.process.stdout is not None:
            found.process.stdout.close()
        found.log.close()


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest."""
    ordered = sorted(values)
    if not ordered:
        return {}
    pick = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {"p50": pick(0.5), "p95": pick(0.95), "p99": pick(0.99), "max": ordered[-1]}


def lag_quantile(metrics: dict[str, float], before: dict[str, float], share: float) -> float:
    """The upper bound in seconds of the bucket that holds this share of the event loop's lags between two readings."""
    found = {}
    for name, value in metrics.items():
        match = re.fullmatch(r'onestill_loop_lag_seconds_bucket\{le="(.+)"\}', name)
        if match:
            found[float(match[1])] = value - before.get(name, 0)
    total = max(found.values())
    return min(bound for bound, n in found.items() if n >= share * total)


def tell(report: dict[str, Any], out: Path | None) -> None:
    """Print a report as JSON, and write it to `out` where that is given."""
    text = json.dumps(report, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")
