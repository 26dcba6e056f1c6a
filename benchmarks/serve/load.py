"""Live typists and API clients at once: `python -m benchmarks.serve.load --rival --out FILE`; see `crowd`.

Latency is from the last key of a sentence to its picture; fairness is Jain's index over pictures per typist.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.serve import rival
from benchmarks.serve.crowd import PAUSE_S, SENTENCES, Crowd
from benchmarks.serve.server import Process, lag_quantile, running, tell

FLAT_MB = 30  # of growth: what is remembered of prompts is bounded by less


async def load(process: Process, typists: int, keys: float, clients: int, seconds: float) -> dict[str, Any]:
    """Run the load and return its report."""
    before = process.metrics()
    until = time.monotonic() + seconds
    crowd = Crowd(process.url, typists, keys, clients)
    memory: list[float] = []

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append((await asyncio.to_thread(process.metrics))["onestill_resident_bytes"] / 1e6)
            await asyncio.sleep(max(1.0, seconds / 20))

    await asyncio.gather(crowd.run(until), watch())
    after = process.metrics()
    drawn = 'onestill_scheduler_total{event="drawn"}'
    return crowd.report() | {
        "seconds": seconds,
        "pictures_per_second": (after.get(drawn, 0) - before.get(drawn, 0)) / seconds,
        "loop_lag_p99_at_most_ms": lag_quantile(after, before, 0.99) * 1000,
        "loop_lag_p90_at_most_ms": lag_quantile(after, before, 0.90) * 1000,
        "memory_mb": {"first": memory[0], "last": memory[-1], "max": max(memory)} if memory else {},
    }


def verdict(crowd: dict[str, Any], alone: dict[str, Any]) -> dict[str, bool]:
    """What issue and docs ask, line by line."""
    memory = crowd["memory_mb"]
    return {
        "every id answered exactly once": crowd["ids"] == crowd["ids_answered_once"] > 0,
        "no picture after a newer one": crowd["stale_pictures"] == 0,
        "no 5xx, no request lost": all(status in ("200", "429") for status in crowd["api_statuses"]),
        "Jain's index at least 0.95": (crowd["jain"] or 0) >= 0.95,
        "loop lag below 20 ms at p99": crowd["loop_lag_p99_at_most_ms"] <= 20,
        "server's own cost at most 5 ms, one typist": alone["own_cost_median_ms"] <= 5,
        "server's own cost at most 5 ms, the crowd": crowd["own_cost_median_ms"] <= 5,
        "memory flat": bool(memory) and memory["last"] - memory["first"] <= FLAT_MB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--typists", type=int, default=16)
    parser.add_argument("--keys", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--rival", action="store_true", help="also Gradio with diffusers, which must be installed")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    short = min(30.0, options.seconds)
    with running(["--batch", str(options.batch), "--model", options.model]) as process:
        alone = asyncio.run(load(process, 1, options.keys, 0, short))
        crowd = asyncio.run(load(process, options.typists, options.keys, options.clients, options.seconds))
        status, seconds = process.stop()
    report: dict[str, Any] = {"asked": verdict(crowd, alone), "alone": alone, "crowd": crowd}
    report["exit"] = {"status": status, "seconds": round(seconds, 2)}
    if options.rival:
        with rival.running() as port:
            for name, people, how_long in (("alone", 1, short), ("crowd", options.typists, options.seconds)):
                report[f"gradio {name}"] = asyncio.run(
                    rival.load(port, people, options.keys, how_long, SENTENCES, PAUSE_S)
                )
    tell(report, options.out)


if __name__ == "__main__":
    main()
