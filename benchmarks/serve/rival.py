"""The same typists on a Gradio app with diffusers: `load.py --rival` runs it after onestill, on the same machine.

Gradio's page sends, with `trigger_mode="always_last"`, one request at a time and then the newest; so does this.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.serve.server import quantiles

START_S = 300


@contextlib.contextmanager
def running() -> Iterator[int]:
    """The app in a process of its own; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serve.gradio_app", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"},
    )
    try:
        ended = time.monotonic() + START_S
        while time.monotonic() < ended and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(30)


async def ask(port: int, method: str, path: str, body: bytes = b"") -> bytes:
    """One request; returns the body of its answer, read to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    head = f"{method} {path} HTTP/1.0\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]


async def draw(port: int, prompt: str) -> None:
    """A picture by Gradio's HTTP calls: ask, wait for the event, fetch the file."""
    event = json.loads(await ask(port, "POST", "/gradio_api/call/draw", json.dumps({"data": [prompt]}).encode()))
    answer = (await ask(port, "GET", f"/gradio_api/call/draw/{event['event_id']}")).decode()
    if "event: complete" not in answer:
        raise RuntimeError(answer[:300])
    data = json.loads(answer.rsplit("data: ", 1)[1].strip())
    path = data[0]["url"].split("/", 3)[3]
    if not (await ask(port, "GET", f"/{path}")).startswith(b"\xff\xd8"):
        raise RuntimeError("no JPEG")


async def typist(
    port: int, seed: int, keys: float, until: float, sentences: tuple[str, ...], pause_s: float
) -> tuple[int, list[float], int]:
    """Types like `load.Typist`; returns the pictures seen, last key to picture in ms, and the keys typed."""
    chance = random.Random(seed)
    newest: list[tuple[str, float, bool]] = []
    wake = asyncio.Event()
    seen, typed = 0, 0
    took_ms: list[float] = []

    async def send() -> None:
        nonlocal seen
        while True:
            await wake.wait()
            wake.clear()
            prompt, at, last = newest.pop()
            newest.clear()
            await draw(port, prompt)
            seen += 1
            if last:
                took_ms.append((time.monotonic() - at) * 1000)

    sender = asyncio.create_task(send())
    due = time.monotonic() + chance.random() / keys
    while time.monotonic() < until:
        sentence = chance.choice(sentences) + f" {chance.randrange(1000)}"
        for end in range(1, len(sentence) + 1):
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += 1 / keys
            typed += 1
            newest.append((sentence[:end], time.monotonic(), end == len(sentence)))
            wake.set()
        due += pause_s
    await asyncio.sleep(min(20.0, 5 * pause_s))
    if sender.done():
        sender.result()
    sender.cancel()
    return seen, took_ms, typed


async def load(
    port: int, typists: int, keys: float, seconds: float, sentences: tuple[str, ...], pause_s: float
) -> dict[str, Any]:
    """Run the typists and return their report, in the words of `load.load`."""
    until = time.monotonic() + seconds
    found = await asyncio.gather(*(typist(port, i, keys, until, sentences, pause_s) for i in range(typists)))
    images = [seen for seen, _, _ in found]
    return {
        "typists": typists,
        "seconds": seconds,
        "keys_typed": sum(typed for _, _, typed in found),
        "pictures_per_typist": {"min": min(images), "max": max(images)},
        "jain": sum(images) ** 2 / (len(images) * sum(n * n for n in images)) if any(images) else None,
        "last_key_to_picture_ms": quantiles([ms for _, times, _ in found for ms in times]),
        "pictures_per_second": sum(images) / seconds,
    }
