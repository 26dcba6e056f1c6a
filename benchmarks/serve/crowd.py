"""Those who ask: people who type, and clients of the images API. Whatever happens to them is counted.

Every typist types sentences key by key at a fixed rate, whatever the server does, and counts the answers to every id.
One whose socket is closed does as the page does: connects anew and asks for the newest words.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from benchmarks.serve.server import quantiles

SENTENCES = (
    "a red apple, fluent 3d emoji",
    "a bicycle, outline icon, blue on white",
    "a green leaf on a purple ground",
    "two yellow stars, noto emoji",
    "a small house under a cloud, pixel art icon",
)
PAUSE_S = 0.7  # after a sentence, in which its picture is looked at
DRAIN_S = 60.0  # for the last answers; only waited for where one is missing
LOST = "lost"  # no answer came
GONE = (OSError, WebSocketException, asyncio.IncompleteReadError)


class Typist:
    """One live connection at `keys` keys a second."""

    def __init__(self, seed: int, keys: float) -> None:
        self.random = random.Random(seed)
        self.address = (f"127.0.0.{seed + 120}", 0)
        self.keys = keys
        self.asked: dict[int, float] = {}
        self.answers: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.last_key_ms: list[float] = []
        self.own_cost_ms: list[float] = []  # of the server's time with a message, what the engine had no part in
        self.outside_ms: list[float] = []  # the rest until it is here: the loopback, and the loops of both processes
        self.stale = 0
        self.cuts = 0  # sockets that were closed
        self.cut_off: set[int] = set()  # ids that those took along
        self._ids = itertools.count()
        self._newest_shown = -1
        self._last_ids: set[int] = set()

    async def type(self, url: str, until: float, headers: dict[str, str], *, again: bool) -> None:
        """Type until then; `again`: connect anew when the socket is closed, else that is the end."""
        while time.monotonic() < until:
            try:
                await self._type(url, until, headers)
                return
            except GONE:
                self.cuts += 1
                self.cut_off |= {name for name in self.asked if not self.answers[name]}
                if not again:
                    return
                await asyncio.sleep(0.2)

    async def _type(self, url: str, until: float, headers: dict[str, str]) -> None:
        async with connect(
            url,
            max_size=2**24,
            compression=None,
            proxy=None,
            additional_headers=headers,
            local_addr=self.address,
        ) as socket:
            await socket.recv()
            reader = asyncio.create_task(self._read(socket))
            try:
                await self._send(socket, until, reader)
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _send(self, socket: Any, until: float, reader: asyncio.Task[None]) -> None:
        due = time.monotonic() + self.random.random() / self.keys
        while time.monotonic() < until:
            sentence = self.random.choice(SENTENCES) + f" {self.random.randrange(1000)}"
            for end in range(1, len(sentence) + 1):
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due += 1 / self.keys
                name = next(self._ids)
                self.asked[name] = time.monotonic()
                if end == len(sentence):
                    self._last_ids.add(name)
                await socket.send(json.dumps({"id": name, "prompt": sentence[:end], "seed": 1}))
                if time.monotonic() > until:
                    break
            due += PAUSE_S
        ended = time.monotonic() + DRAIN_S
        while len(self.answers) + len(self.cut_off) < len(self.asked) and time.monotonic() < ended:
            if reader.done():
                raise ConnectionResetError
            await asyncio.sleep(0.05)

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
                self.own_cost_ms.append(timings["total_ms"] - stages)
                self.outside_ms.append(took - timings["total_ms"])
                if name in self._last_ids:
                    self.last_key_ms.append(took)


class Crowd:
    """Typists and API clients of one server, each from an address of its own, as strangers would be.

    Args:
        url: of the server, as http://host:port.
        typists, keys: how many, and keys a second of each.
        clients: of the images API, each asking for one picture after the other, and for none twice.
        headers: of all of them.
    """

    def __init__(
        self, url: str, typists: int, keys: float, clients: int, headers: dict[str, str] | None = None
    ) -> None:
        self.url = url
        self.headers = headers or {}
        self.people = [Typist(i, keys) for i in range(typists)]
        self.clients = clients
        self.statuses: Counter[str] = Counter()
        self.page: Counter[str] = Counter()
        self.api_ms: list[float] = []

    async def run(self, until: float, *, again: bool = False) -> None:
        """Ask until then. `again`: go on when connections are closed; else each of them stops there."""
        socket = self.url.replace("http", "ws", 1) + "/v1/realtime"
        await asyncio.gather(
            *(person.type(socket, until, self.headers, again=again) for person in self.people),
            *(self._client(i, until, again) for i in range(self.clients)),
            self._look(until, again),
        )

    async def _client(self, seed: int, until: float, again: bool) -> None:
        for number in itertools.count():
            if time.monotonic() > until:
                return
            fields = {"prompt": "a blue star, twemoji", "output_format": "jpeg", "seed": seed * 1000 + number}
            started = time.monotonic()
            status = await self._ask("POST", "/v1/images/generations", json.dumps(fields).encode(), seed)
            self.statuses[status] += 1
            if status == "200":
                self.api_ms.append((time.monotonic() - started) * 1000)
            elif status == LOST and not again:
                return
            else:
                await asyncio.sleep(0.5)

    async def _look(self, until: float, again: bool) -> None:
        """Open the page every second."""
        while time.monotonic() < until:
            status = await self._ask("GET", "/", b"", 100)
            self.page[status] += 1
            if status == LOST and not again:
                return
            await asyncio.sleep(1)

    async def _ask(self, method: str, path: str, body: bytes, source: int) -> str:
        """One request, tried once; returns its status."""
        place = urlsplit(self.url)
        more = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: {place.hostname}\r\ncontent-type: application/json\r\n{more}"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        writer = None
        try:
            reader, writer = await asyncio.open_connection(
                place.hostname, place.port, local_addr=(f"127.0.0.{source + 2}", 0)
            )
            writer.write(head.encode() + body)
            status = (await reader.readline()).split()[1].decode()
            whole = await reader.read()
        except (*GONE, IndexError):
            return LOST
        finally:
            if writer is not None:
                writer.close()
        length = next((line for line in whole.split(b"\r\n") if line.lower().startswith(b"content-length:")), b": 0")
        return status if len(whole.partition(b"\r\n\r\n")[2]) >= int(length.partition(b":")[2]) else LOST

    # --- what came of it --------------------------------------------------------------------------------------------

    @property
    def arrived(self) -> int:
        """Pictures that came."""
        return self.statuses["200"] + sum(person.kinds["image"] for person in self.people)

    @property
    def asked(self) -> int:
        """Pictures that may have been drawn: those that came, and what was under way when a connection was closed."""
        return self.arrived + self.statuses[LOST] + sum(len(person.cut_off) for person in self.people)

    def report(self) -> dict[str, Any]:
        """Counts and times."""
        people = self.people
        images = [person.kinds["image"] for person in people]
        return {
            "typists": len(people),
            "keys_per_second": people[0].keys if people else 0,
            "api_clients": self.clients,
            "ids": sum(len(person.asked) for person in people),
            "ids_answered_once": sum(sum(n == 1 for n in person.answers.values()) for person in people),
            "ids_answered_more_than_once": sum(sum(n > 1 for n in person.answers.values()) for person in people),
            "ids_cut_off": sum(len(person.cut_off) for person in people),
            "sockets_cut": sum(person.cuts for person in people),
            "answers": dict(sum((person.kinds for person in people), Counter[str]())),
            "stale_pictures": sum(person.stale for person in people),
            "pictures_per_typist": {"min": min(images), "max": max(images)} if images else {},
            "jain": sum(images) ** 2 / (len(images) * sum(n * n for n in images)) if any(images) else None,
            "last_key_to_picture_ms": quantiles([ms for person in people for ms in person.last_key_ms]),
            "own_cost_median_ms": statistics.median([ms for one in people for ms in one.own_cost_ms] or [0.0]),
            "outside_median_ms": statistics.median([ms for one in people for ms in one.outside_ms] or [0.0]),
            "api_statuses": dict(self.statuses),
            "api_ms": quantiles(self.api_ms),
            "page_statuses": dict(self.page),
        }
