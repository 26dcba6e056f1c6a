"""Live typists and API clients at once: `python -m benchmarks.serve.load --out FILE`.

Every typist types sentences key by key at a fixed rate, whatever the server does, and counts the answers to every id.
Latency is from the last key of a sentence to its picture; fairness is Jain's index over pictures per typist.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect

from benchmarks.serve import rival
from benchmarks.serve.server import Process, lag_quantile, quantiles, running, tell

SENTENCES = (
    "a red apple, fluent 3d emoji",
    "a bicycle, outline icon, blue on white",
    "a green leaf on a purple ground",
    "two yellow stars, noto emoji",
    "a small house under a cloud, pixel art icon",
)
PAUSE_S = 0.7  # after a sentence, in which its picture is looked at
DRAIN_S = 20.0


class Typist:
    """One live connection at `keys` keys a second."""

    def __init__(self, seed: int, keys: float) -> None:
        self.random = random.Random(seed)
        self.keys = keys
        self.asked: dict[int, float] = {}
        self.answers: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.last_key_ms: list[float] = []
        self.own_cost_ms: list[float] = []
        self.stale = 0
        self._newest_shown = -1
        self._last_ids: set[int] = set()

    async def type(self, url: str, until: float) -> None:
        async with connect(url, max_size=2**24, compression=None, proxy=None) as socket:
            await socket.recv()
            reader = asyncio.create_task(self._read(socket))
            ids = itertools.count()
            due = time.monotonic() + self.random.random() / self.keys
            while time.monotonic() < until:
                sentence = self.random.choice(SENTENCES) + f" {self.random.randrange(1000)}"
                for end in range(1, len(sentence) + 1):
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    due += 1 / self.keys
                    name = next(ids)
                    self.asked[name] = time.monotonic()
                    if end == len(sentence):
                        self._last_ids.add(name)
                    await socket.send(json.dumps({"id": name, "prompt": sentence[:end], "seed": 1}))
                    if time.monotonic() > until:
                        break
                due += PAUSE_S
            ended = time.monotonic() + DRAIN_S
            while len(self.answers) < len(self.asked) and time.monotonic() < ended:
                await asyncio.sleep(0.05)
            reader.cancel()

    async def _read(self, socket: Any) -> None:
        async for message in socket:
            now = time.monotonic()
            if isinstance(message, str):
                answer = json.loads(message)
            else:
                answer = json.loads(message[4 : 4 + int.from_bytes(message[:4], "big")])
            name = answer["id"]
            self.answers[name] += 1
            self.kinds[answer["type"]] += 1
            if answer["type"] == "image":
                self.stale += name < self._newest_shown
                self._newest_shown = max(self._newest_shown, name)
                took = (now - self.asked[name]) * 1000
                timings = answer["timings"]
                stages = sum(timings[part] for part in ("queue_ms", "encode_ms", "denoise_ms", "decode_ms"))
                self.own_cost_ms.append(took - stages)
                if name in self._last_ids:
                    self.last_key_ms.append(took)


async def api_client(process: Process, seed: int, until: float, found: Counter[str], took_ms: list[float]) -> None:
    """One after the other, a picture each, on a connection of its own."""
    body = {"prompt": "a blue star, twemoji", "n": 1, "output_format": "jpeg"}
    for number in itertools.count():
        if time.monotonic() > until:
            return
        data = json.dumps(body | {"seed": seed * 1000 + number}).encode()
        started = time.monotonic()
        # Each from an address of its own, as strangers would: those without a key take turns by address.
        source = (f"127.0.0.{seed + 2}", 0)
        reader, writer = await asyncio.open_connection(process.host, process.port, local_addr=source)
        writer.write(
            f"POST /v1/images/generations HTTP/1.1\r\nhost: {process.host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\nconnection: close\r\n\r\n".encode()
            + data
        )
        status = (await reader.readline()).split()[1].decode()
        await reader.read()
        writer.close()
        found[status] += 1
        if status == "200":
            took_ms.append((time.monotonic() - started) * 1000)
        else:
            await asyncio.sleep(0.5)


async def load(process: Process, typists: int, keys: float, clients: int, seconds: float) -> dict[str, Any]:
    """Run the load and return its report."""
    before = process.metrics()
    until = time.monotonic() + seconds
    people = [Typist(i, keys) for i in range(typists)]
    statuses: Counter[str] = Counter()
    api_ms: list[float] = []
    memory: list[float] = []

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append((await asyncio.to_thread(process.metrics))["onestill_resident_bytes"] / 1e6)
            await asyncio.sleep(max(1.0, seconds / 20))

    await asyncio.gather(
        *(person.type(process.socket_url, until) for person in people),
        *(api_client(process, i, until, statuses, api_ms) for i in range(clients)),
        watch(),
    )
    after = process.metrics()
    images = [person.kinds["image"] for person in people]
    kinds = sum((person.kinds for person in people), Counter[str]())
    asked = sum(len(person.asked) for person in people)
    return {
        "typists": typists,
        "keys_per_second": keys,
        "api_clients": clients,
        "seconds": seconds,
        "ids": asked,
        "ids_answered_once": sum(sum(n == 1 for n in person.answers.values()) for person in people),
        "ids_answered_more_than_once": sum(sum(n > 1 for n in person.answers.values()) for person in people),
        "answers": dict(kinds),
        "stale_pictures": sum(person.stale for person in people),
        "pictures_per_typist": {"min": min(images), "max": max(images)} if images else {},
        "jain": sum(images) ** 2 / (len(images) * sum(n * n for n in images)) if any(images) else None,
        "last_key_to_picture_ms": quantiles([ms for person in people for ms in person.last_key_ms]),
        "own_cost_median_ms": statistics.median([ms for person in people for ms in person.own_cost_ms] or [0.0]),
        "api_statuses": dict(statuses),
        "api_ms": quantiles(api_ms),
        "pictures_per_second": (
            after.get('onestill_scheduler_total{event="drawn"}', 0)
            - before.get('onestill_scheduler_total{event="drawn"}', 0)
        )
        / seconds,
        "loop_lag_p99_at_most_ms": lag_quantile(after, before, 0.99) * 1000,
        "memory_mb": {"first": memory[0], "last": memory[-1], "max": max(memory)} if memory else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--typists", type=int, default=16)
    parser.add_argument("--keys", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rival", action="store_true", help="also Gradio with diffusers, which must be installed")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with running(["--batch", str(options.batch)]) as process:
        report = {
            "alone": asyncio.run(load(process, 1, options.keys, 0, min(15.0, options.seconds))),
            "crowd": asyncio.run(load(process, options.typists, options.keys, options.clients, options.seconds)),
        }
        status, seconds = process.stop()
        report["exit"] = {"status": status, "seconds": round(seconds, 2)}
    if options.rival:
        with rival.running() as port:
            report["gradio alone"] = asyncio.run(
                rival.load(port, 1, options.keys, min(15.0, options.seconds), SENTENCES, PAUSE_S)
            )
            report["gradio crowd"] = asyncio.run(
                rival.load(port, options.typists, options.keys, options.seconds, SENTENCES, PAUSE_S)
            )
    tell(report, options.out)


if __name__ == "__main__":
    main()
