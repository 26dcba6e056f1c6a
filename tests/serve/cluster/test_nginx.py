"""Two servers, one PostgreSQL and the real proxy, as in `deploy/compose.yaml`; one of the servers is killed."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from benchmarks.serve.server import Process, running
from onestill.serve.access.ledger import Ledger
from tests.serve.nginx import nginx
from tests.serve.postgres import postgres

pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")
pytestmark = pytest.mark.slow
CLIENTS = 10  # so many that both servers have some


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Stack:
    """What compose would start; see the module."""

    def __init__(self, stack: ExitStack, model: Path) -> None:
        url = stack.enter_context(postgres())
        self.ledger = Ledger(url)
        stack.callback(self.ledger.close)
        self.key_id, self.key = self.ledger.add_key("load", 10_000)
        options = ["--model", str(model), "--threads", "1", "--database", url, "--trust-proxy", "127.0.0.1"]
        self.servers = [stack.enter_context(running(options)) for _ in range(2)]
        self.port = stack.enter_context(nginx(*(f"{one.host}:{one.port}" for one in self.servers)))

    def ask(self, method: str, path: str, body: Any = None, source: int = 2, **headers: str) -> tuple[int, bytes]:
        """One request from an address of its own, tried once."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=120, source_address=(f"127.0.0.{source}", 0)
        )
        try:
            data = None if body is None else json.dumps(body).encode()
            more = {"authorization": f"Bearer {self.key}", "content-type": "application/json"}
            connection.request(method, path, data, {**more, **headers})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def draw(self, source: int) -> int:
        return self.ask("POST", "/v1/images/generations", {"prompt": "a", "num_inference_steps": 4}, source)[0]

    def drawn(self, server: Process) -> float:
        return server.metrics().get('onestill_scheduler_total{event="drawn"}', 0.0)


def test_a_server_is_killed_behind_the_proxy_and_nothing_is_lost(tiny_folder: Path) -> None:
    with ExitStack() as opened:
        stack = Stack(opened, tiny_folder)
        first, second = stack.servers
        before = [stack.drawn(one) for one in stack.servers]
        for _ in range(3):
            assert stack.draw(2) == 200
        assert sorted(stack.drawn(one) - old for one, old in zip(stack.servers, before, strict=True)) == [
            0,
            3,
        ]  # sticky
        statuses: Counter[int] = Counter()
        ended = threading.Event()

        def draw(source: int) -> None:
            while not ended.is_set():
                statuses[stack.draw(source)] += 1

        threads = [threading.Thread(target=draw, args=(source,)) for source in range(2, 2 + CLIENTS)]
        for thread in threads:
            thread.start()
        until(lambda: min(map(stack.drawn, stack.servers)) >= 4)
        first.stop(signal.SIGKILL)
        enough = sum(statuses.values()) + 4 * CLIENTS
        until(lambda: sum(statuses.values()) >= enough)
        assert stack.ask("GET", "/")[0] == 200  # the page stays up
        ended.set()
        for thread in threads:
            thread.join(120)
        assert set(statuses) == {200}
        counted = {row["id"]: row for row in stack.ledger.list_keys()}[stack.key_id]["today"]
        # What was under way may have been counted by the one that died, and was again by the one that drew it.
        assert 0 <= counted - statuses[200] - 3 <= CLIENTS
        assert second.stop(signal.SIGTERM)[0] == 0


def test_a_socket_goes_to_the_other_server(tiny_folder: Path) -> None:
    with ExitStack() as opened:
        stack = Stack(opened, tiny_folder)
        headers = {"authorization": f"Bearer {stack.key}"}
        place = f"ws://127.0.0.1:{stack.port}/v1/realtime"

        def draw() -> None:
            socket.send('{"id": 1, "prompt": "a"}')
            assert isinstance(socket.recv(timeout=60), bytes)

        with connect(place, additional_headers=headers, compression=None, proxy=None) as socket:
            assert json.loads(socket.recv(timeout=60))["type"] == "ready"
            draw()
            holder = next(one for one in stack.servers if one.metrics()["onestill_live_connections"])
            holder.stop(signal.SIGKILL)
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=60)
        # As the page does, which then asks for its newest words again.
        with connect(place, additional_headers=headers, compression=None, proxy=None) as socket:
            assert json.loads(socket.recv(timeout=60))["type"] == "ready"
            draw()
