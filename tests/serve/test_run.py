from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

from websockets.sync.client import connect

from onestill.pipeline import Pipeline
from onestill.serve import paced, run
from onestill.serve.web.requests import Bounds
from onestill.serve.web.server import Settings
from tests.serve.client import serving


def test_a_connection_that_asks_nothing_is_closed(tiny_pipe: Pipeline, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "HEADERS_S", 0.2)
    with serving(tiny_pipe) as served, socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost:")
        assert client.recv(100) == b""


def test_a_connection_that_asks_nothing_more_is_closed(tiny_pipe: Pipeline, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "HEADERS_S", 1)
    monkeypatch.setattr(run, "KEEP_ALIVE_S", 1)
    with serving(tiny_pipe) as served, socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        for pause_s in (0.5, 0):  # who asks again in time is answered
            client.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                more = client.recv(1000)
                assert more
                answer += more
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(pause_s)
        client.sendall(b"G")
        assert client.recv(1000) == b""


def test_an_answer_that_nobody_reads_is_not_kept(monkeypatch: Any) -> None:
    monkeypatch.setattr(paced, "UNREAD_S", 0.3)
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b"x" * 2**25, "more_body": True})
        await send({"type": "http.response.body", "body": b"x"})
        ended.append((await receive())["type"])

    started = threading.Event()
    with run.listen("127.0.0.1", 0) as bound:
        server = run.make_proxy_server(app, 1000, ready=started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        assert started.wait(20)
        port = bound.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
            silent.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            deadline = time.monotonic() + 20
            while not ended and time.monotonic() < deadline:
                time.sleep(0.05)
            assert ended == ["http.disconnect"]
        with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:  # who reads has all
            slow.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            total = 0
            while data := slow.recv(2**20):
                total += len(data)
                time.sleep(0.03)
            assert total > 2**25
        server.should_exit = True
        thread.join(30)


def test_idle_connections_of_one_address_make_room_for_its_own_and_for_others(
    tiny_pipe: Pipeline, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run, "CONNECTIONS", 40)
    monkeypatch.setattr(run, "CONNECTIONS_EACH", 20)
    with serving(tiny_pipe) as served, contextlib.ExitStack() as open_ones:
        address = ("127.0.0.1", served.port)
        for number in range(8):
            for _ in range(30):
                source = (f"127.0.0.{number + 2}", 0)
                open_ones.enter_context(socket.create_connection(address, timeout=20, source_address=source))
        assert served.ask("GET", "/healthz").status == 200
        assert served.draw(seed=1).status == 200
        with served.live() as live:
            live.send('{"id": 1, "prompt": "a"}')
            live.recv(timeout=20)


def test_a_few_addresses_leave_live_connections_to_others(tiny_pipe: Pipeline) -> None:
    settings = Settings(bounds=Bounds(live=64, live_each=8))
    with serving(tiny_pipe, settings) as served, contextlib.ExitStack() as open_ones:
        for number in range(8):
            for _ in range(8):
                source = (f"127.0.0.{number + 2}", 0)
                socket_ = connect(f"ws://127.0.0.1:{served.port}/v1/realtime", source_address=source, proxy=None)
                open_ones.enter_context(socket_)
        assert sum(served.server.live.values()) < 64
        with served.live():
            pass
