"""A typist while others attack: `python -m benchmarks.serve.attack --out FILE`. Linux, some five minutes.

Before each attack the typist types alone on a new server. During it a second client asks for /healthz, and memory is
read; then SIGTERM comes while the attack goes on. `attackers` says what each attack is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect

from benchmarks.serve.attackers import ATTACKS
from benchmarks.serve.crowd import GONE, SENTENCES
from benchmarks.serve.server import Process, quantiles, running, tell

KEYS = 8.0  # a second
TIMES_SLOWER, HEALTH_MS, GROWTH_MB, END_S = 2.0, 200.0, 200.0, 10.0  # what is allowed under attack
HEALTH_EACH_S = 0.2
WORKER = "onestill.serve.uploads.worker"


class Typist:
    """Types until a moment, and measures for each key how long its picture, or that of a later key, took to come."""

    def __init__(self) -> None:
        self.waits_ms: list[float] = []
        self.keys = self.cuts = 0
        self._waiting: dict[int, float] = {}

    async def type(self, url: str, until: float) -> None:
        while time.monotonic() < until:
            try:
                async with connect(url, compression=None, proxy=None, max_size=2**24, open_timeout=20) as socket:
                    reader = asyncio.create_task(self._read(socket))
                    try:
                        await self._send(socket, until)
                    finally:
                        reader.cancel()
            except (*GONE, TimeoutError):
                self.cuts += 1
                await asyncio.sleep(0.1)
        now = time.monotonic()
        self.waits_ms += [(now - at) * 1000 for at in self._waiting.values()]  # at least

    async def _send(self, socket: Any, until: float) -> None:
        while time.monotonic() < until:
            for end in range(1, len(SENTENCES[0]) + 1):
                if time.monotonic() > until:
                    break
                self.keys += 1
                self._waiting[self.keys] = time.monotonic()
                fields = {"id": self.keys, "prompt": SENTENCES[0][:end], "seed": self.keys}
                await socket.send(json.dumps(fields))
                await asyncio.sleep(1 / KEYS)
        ended = time.monotonic() + 5
        while self._waiting and time.monotonic() < ended:
            await asyncio.sleep(0.02)

    async def _read(self, socket: Any) -> None:
        async for message in socket:
            if isinstance(message, bytes):
                answer = json.loads(message[4 : 4 + int.from_bytes(message[:4], "big")])
                now = time.monotonic()
                for key in [key for key in self._waiting if key <= answer["id"]]:
                    self.waits_ms.append((now - self._waiting.pop(key)) * 1000)


async def health(process: Process, until: float) -> tuple[list[float], int]:
    """How long /healthz took, in ms, and how often it did not answer 200 within ten seconds."""
    times, failures = [], 0
    while time.monotonic() < until:
        started = time.monotonic()
        try:
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection(process.host, process.port, local_addr=("127.0.0.99", 0))
                writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                failures += not (await reader.read()).startswith(b"HTTP/1.1 200 ")
                writer.close()
        except (OSError, TimeoutError):
            failures += 1
        times.append((time.monotonic() - started) * 1000)
        await asyncio.sleep(HEALTH_EACH_S)
    return times, failures


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident memory in MB of a process and its children, without those that decode uploads, and of those."""
    own = decoders = 0.0
    with suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        size = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        if WORKER in Path(f"/proc/{pid}/cmdline").read_text():
            decoders = size
        else:
            own = size
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found = memory_mb(int(child))
                own, decoders = own + found[0], decoders + found[1]
    return own, decoders


async def watched(process: Process, seconds: float) -> dict[str, Any]:
    """The typist, health and memory for so long."""
    until = time.monotonic() + seconds
    typist = Typist()
    memory: list[tuple[float, float]] = []

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(memory_mb(process.process.pid))
            await asyncio.sleep(0.25)

    (times, failures), *_ = await asyncio.gather(
        health(process, until), watch(), typist.type(process.socket_url, until)
    )
    return {
        "keys": typist.keys,
        "sockets_cut": typist.cuts,
        "key_to_picture_ms": quantiles(typist.waits_ms),
        "health_ms": quantiles(times),
        "health_failures": failures,
        "memory_mb": {"first": memory[0][0], "max": max(own for own, _ in memory), "last": memory[-1][0]},
        "decoders_mb": {"max": max(own for _, own in memory), "last": memory[-1][1]},
    }


@contextmanager
def attacking(name: str, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.serve.attackers", name, str(port)]
    attacker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert attacker.stdout is not None
        attacker.stdout.readline()
        yield
    finally:
        attacker.kill()
        attacker.wait()


def measured(name: str, options: list[str], alone_s: float, seconds: float) -> dict[str, Any]:
    """One attack on a new server."""
    with running(options) as process:
        asyncio.run(watched(process, 2))  # the first words
        alone = asyncio.run(watched(process, alone_s))
        with attacking(name, process.port):
            attacked = asyncio.run(watched(process, seconds))
            try:
                status, took = process.stop(wait_s=30)
            except subprocess.TimeoutExpired:
                status, took = -9, 30.0
        errors = process.errors()
    slower = attacked["key_to_picture_ms"]["p95"] / alone["key_to_picture_ms"]["p95"]
    growth = attacked["memory_mb"]["max"] - alone["memory_mb"]["first"]
    return {
        "what": ATTACKS[name].__doc__,
        "asked": {
            f"p95 of a key to its picture at most {TIMES_SLOWER:g} times its value alone": slower <= TIMES_SLOWER,
            f"health below {HEALTH_MS:g} ms at p95, always 200": attacked["health_ms"]["p95"] < HEALTH_MS
            and not attacked["health_failures"],
            f"memory within {GROWTH_MB:g} MB of its start": growth <= GROWTH_MB,
            f"SIGTERM ends it with status 0 within {END_S:g} s": status == 0 and took <= END_S,
        },
        "p95_times": round(slower, 2),
        "memory_growth_mb": round(growth, 1),
        "sigterm": {"status": status, "seconds": round(took, 2)},
        "alone": alone,
        "attacked": attacked,
        "log": errors[-500:],
    }


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        "| attack | p95 alone | p95 attacked | health p50, p95, max | server's memory | decoders' | SIGTERM |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in report["attacks"].items():
        alone, attacked = one["alone"], one["attacked"]
        health_ms = ", ".join(f"{attacked['health_ms'][part]:.0f}" for part in ("p50", "p95", "max"))
        lines.append(
            f"| {name.replace('_', ' ')} | {alone['key_to_picture_ms']['p95']:.0f} ms "
            f"| {attacked['key_to_picture_ms']['p95']:.0f} ms | {health_ms} ms | {one['memory_growth_mb']:+.0f} MB "
            f"| {attacked['decoders_mb']['max']:.0f} MB | {one['sigterm']['seconds']:.1f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attack", action="append", choices=sorted(ATTACKS), help="repeatable; else all")
    parser.add_argument("--alone", type=float, default=6.0, help="seconds before each attack")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each attack")
    parser.add_argument("--model", default="icons")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "attacks": {}}
    for name in options.attack or ATTACKS:
        report["attacks"][name] = measured(name, ["--model", options.model], options.alone, options.seconds)
        print(table({"attacks": {name: report["attacks"][name]}}), file=sys.stderr)
    tell(report, options.out)
    print(table(report))


if __name__ == "__main__":
    main()
