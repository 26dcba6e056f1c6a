"""Messages and uploads that mean harm: `python -m benchmarks.serve.fuzz --messages 20000`.

Made from a seed, so that what was found can be found again. Nothing may be answered with 5xx but 503, nothing may hang,
every message is answered exactly once, memory and open files stay where they were, and the server draws at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import json
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from benchmarks.serve.server import Process, running, tell

HANG_S = 60.0
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, -0.0),
    *(float("nan"), float("inf"), "", " ", "\0", "a", "\ud800", "\udfff\ud800", "🦖" * 50, "A" * 5000, "../../x"),
    *("\u202e", "\ufeff", "' OR 1=1 --", "<script>", "%s%n", "${jndi:x}", [], {}, [[]], {"a": {}}, [0] * 50),
)
NAMES = ("id", "prompt", "seed", "n", "size", "num_inference_steps", "strength", "format", "quality", "x", "", "\0")


def fuzzed_object(chance: random.Random) -> dict[str, Any]:
    """A request with some of its fields wrong, left out or made up."""
    fields: dict[str, Any] = {"id": chance.randrange(10**6), "prompt": "a red apple", "seed": 1}
    for _ in range(chance.randrange(4)):
        name = chance.choice(NAMES)
        if chance.random() < 0.2:
            fields.pop(name, None)
        else:
            fields[name] = chance.choice(VALUES)
    return fields


def fuzzed_bytes(chance: random.Random, data: bytes) -> bytes:
    """The data with bytes changed, cut out, doubled or added."""
    found = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(found) + 1)
        kind = chance.randrange(4)
        if kind == 0 and found:
            found[at % len(found)] = chance.randrange(256)
        elif kind == 1:
            del found[at : at + chance.randrange(40)]
        elif kind == 2:
            found[at:at] = chance.randbytes(chance.randrange(40))
        else:
            found[at:at] = found[at : at + 60]
    return bytes(found)


def fuzzed_picture(chance: random.Random) -> bytes:
    """A PNG, JPEG or WebP, often broken; or one that claims to be enormous; or something else altogether."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.randrange(300))
    if kind == 1:
        size = struct.pack(">II", chance.choice((0, 1, 30000, 2**31 - 1)), chance.choice((1, 30000, 2**31 - 1)))
        head = size + bytes((8, chance.choice((0, 2, 3, 6)), 0, 0, chance.randrange(2)))
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
        parts = (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    file = io.BytesIO()
    size_px = (chance.randrange(1, 70), chance.randrange(1, 70))
    mode = chance.choice(("RGB", "L", "RGBA", "P", "1", "I;16"))
    name = chance.choice(("PNG", "JPEG", "WEBP")) if mode in ("RGB", "L") else "PNG"
    PIL.Image.new(mode, size_px, 1).save(file, name)
    return file.getvalue() if kind == 2 else fuzzed_bytes(chance, file.getvalue())


def fuzzed_message(chance: random.Random) -> str | bytes:
    """One message for the socket."""
    text = json.dumps(fuzzed_object(chance))
    kind = chance.randrange(6)
    if kind == 0:
        return fuzzed_bytes(chance, text.encode()).decode("utf-8", "replace")
    if kind == 1:
        return chance.randbytes(chance.randrange(200))
    if kind == 2:
        head = text.encode()
        size = len(head) if chance.random() < 0.8 else chance.choice((0, 2**31, 2**32 - 1, 3))
        return size.to_bytes(4, "big") + head + fuzzed_picture(chance)
    return text


async def fuzz_socket(url: str, messages: int, seed: int) -> dict[str, Any]:
    """Send messages over connections that are left and made anew; every one must be answered."""
    chance = random.Random(seed)
    kinds: Counter[str] = Counter()
    sent = answered = 0
    while sent < messages:
        async with connect(url, max_size=2**24, compression=None, proxy=None) as socket:
            await asyncio.wait_for(socket.recv(), HANG_S)
            batch = min(messages - sent, chance.randrange(1, 200))
            leave = chance.random() < 0.2  # in the middle, without reading

            async def shout(socket: Any = socket, batch: int = batch) -> None:
                for _ in range(batch):
                    await socket.send(fuzzed_message(chance))

            shouting = asyncio.create_task(shout())
            try:
                for _ in range(0 if leave else batch):
                    message = await asyncio.wait_for(socket.recv(), HANG_S)
                    head = message if isinstance(message, str) else message[4 : 4 + int.from_bytes(message[:4], "big")]
                    answer = json.loads(head)
                    kinds[answer["type"] if answer["type"] != "error" else answer["error"]["code"]] += 1
                    answered += 1
                await asyncio.wait_for(shouting, HANG_S)
            except ConnectionClosed as closed:
                kinds[f"closed {closed.rcvd.code if closed.rcvd else None}"] += 1
                shouting.cancel()
            sent += batch
    return {"sent": sent, "answered": answered, "answers": dict(kinds)}


def fuzz_uploads(host: str, port: int, uploads: int, seed: int) -> dict[str, Any]:
    """Post forms with broken pictures, broken fields and broken boundaries, and JSON that is none."""
    chance = random.Random(seed)
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    connection = http.client.HTTPConnection(host, port, timeout=HANG_S)
    for _ in range(uploads):
        body, kind, path = fuzzed_post(chance)
        try:
            connection.request("POST", path, body, {"content-type": kind})
            response = connection.getresponse()
            data = response.read()
            statuses[response.status] += 1
            if response.status >= 500 and response.status != 503:
                faults.append(data[:300].decode("utf-8", "replace"))
        except (http.client.HTTPException, ConnectionError):
            statuses[0] += 1  # the server hung up, which it may after what it could not read
        if chance.random() < 0.05 or statuses[0]:
            connection.close()
    connection.close()
    return {"sent": uploads, "statuses": dict(statuses), "faults": faults[:5]}


def fuzzed_post(chance: random.Random) -> tuple[bytes, str, str]:
    if chance.random() < 0.3:
        text = json.dumps(fuzzed_object(chance)).encode()
        return fuzzed_bytes(chance, text), "application/json", "/v1/images/generations"
    fields = {"prompt": "a", **{str(name): str(value) for name, value in fuzzed_object(chance).items() if name != "id"}}
    parts = [
        b'--XX\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + fuzzed_picture(chance) + b"\r\n"
    ]
    for name, value in fields.items():
        head = f'--XX\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        parts.append(head.encode("utf-8", "replace"))
    body = b"".join(parts) + b"--XX--\r\n"
    if chance.random() < 0.2:
        body = fuzzed_bytes(chance, body)
    boundary = chance.choice(("XX", "XX", "XX", "XX", "YY", "", "X" * 100))
    return body, f"multipart/form-data; boundary={boundary}", "/v1/images/edits"


def fuzz(process: Process, messages: int, seed: int) -> dict[str, Any]:
    """Half of the messages over the socket, half as uploads."""
    open_files: Callable[[], int] = lambda: len(list(Path(f"/proc/{process.pid}/fd").iterdir()))  # noqa: E731
    fuzz_uploads(process.host, process.port, 200, seed + 1)  # what is only made on first use does not count as a leak
    asyncio.run(fuzz_socket(process.socket_url, 200, seed + 1))
    before = process.metrics()["onestill_resident_bytes"], open_files()
    started = time.monotonic()
    socket = asyncio.run(fuzz_socket(process.socket_url, messages // 2, seed))
    uploads = fuzz_uploads(process.host, process.port, messages - messages // 2, seed)
    took = time.monotonic() - started
    process.draw(seed=1)
    time.sleep(1)
    after = process.metrics()
    return {
        "seconds": round(took, 1),
        "socket": socket,
        "uploads": uploads,
        "memory_mb": [round(value / 1e6, 1) for value in (before[0], after["onestill_resident_bytes"])],
        "open_files": [before[1], open_files()],
        "live_connections": after["onestill_live_connections"],
        "waiting": after["onestill_waiting_pictures"],
        "engine_faults": after.get('onestill_scheduler_total{event="faults"}', 0.0),
        "log": process.errors()[-1000:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with running(["--model", options.model]) as process:
        report = fuzz(process, options.messages, options.seed)
        report["exit_status"] = process.stop()[0]
    tell(report, options.out)


if __name__ == "__main__":
    main()
