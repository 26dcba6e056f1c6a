from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from onestill.serve import paced, run

HELLO = (
    b"GET /%s HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
PING, PONG, TEXT = 9, 10, 1


class App:
    """Counts what arrives, echoes bodies, and sends messages on the path /fill without end."""

    def __init__(self) -> None:
        self.received = 0
        self.messages: list[str] = []
        self.ended: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self._echo(receive, send)
        else:
            await self._listen(scope, receive, send)

    async def _echo(self, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            self.received += len(message["body"])
            body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def _listen(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while scope["path"] == "/fill":
                await send({"type": "websocket.send", "bytes": bytes(2**18)})
        except OSError:
            return
        while (message := await receive())["type"] != "websocket.disconnect":
            self.messages.append(message["text"])
        self.ended.append(message["code"])


@contextlib.contextmanager
def running() -> Iterator[tuple[App, int]]:
    app, started = App(), threading.Event()
    with run.listen("127.0.0.1", 0) as bound:
        server = run.make_proxy_server(app, 2**20, ready=started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        assert started.wait(20)
        try:
            yield app, bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@contextlib.contextmanager
def connected(port: int, hello: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        if hello:
            client.sendall(hello)
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):
                answer += client.recv(1)
            assert answer.startswith(b"HTTP/1.1 101 ")
        yield client


def frame(kind: int, data: bytes = b"", *, first: int = 0x80) -> bytes:
    """A masked frame; the mask is zero."""
    size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
    return bytes([first | kind]) + size + bytes(4) + data


def flood(client: socket.socket, data: bytes, seconds: float) -> int:
    """Send as much as the server takes for so long; returns how many bytes went out."""
    client.settimeout(0.1)
    sent, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(TimeoutError):
            sent += client.send(data)
    return sent


def ask(port: int, body: bytes | Iterator[bytes]) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/", body, encode_chunked=True)
        return connection.getresponse().read()
    finally:
        connection.close()


def test_a_body_arrives_whole_however_it_was_cut() -> None:
    body = bytes(range(256)) * 4000
    with running() as (_, port):
        assert ask(port, body) == body
        assert ask(port, (body[i : i + 1] for i in range(1500))) == body[:1500]
        assert ask(port, (body[i : i + 5000] for i in range(0, len(body), 5000))) == body


def test_a_flood_of_chunks_is_read_slowly_and_delays_nobody() -> None:
    with running() as (app, port), connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        started = time.monotonic()
        flood(client, b"1\r\nx\r\n" * 50_000, 2)
        took = time.monotonic() - started
        assert 500 < app.received < paced.PARTS_EACH_S * (2 + took) + 60_000  # the rate, its burst, and one slice
        assert ask(port, b"a") == b"a"


def test_messages_in_one_packet_arrive_in_order() -> None:
    with running() as (app, port), connected(port, HELLO % b"") as client:
        words = [f"{i} " + "x" * (i % 300) for i in range(400)]
        client.sendall(b"".join(frame(TEXT, word.encode()) for word in words))
        deadline = time.monotonic() + 20
        while len(app.messages) < len(words) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert app.messages == words


def test_a_flood_of_pings_is_answered_slowly() -> None:
    with running() as (app, port), connected(port, HELLO % b"") as client:
        started = time.monotonic()
        flood(client, frame(PING) * 20_000, 1.5)
        took = time.monotonic() - started
        client.settimeout(0.3)
        pongs = 0
        with contextlib.suppress(TimeoutError):
            while time.monotonic() - started < took + 2:
                pongs += len(client.recv(2**16)) // 2
        took = time.monotonic() - started
        assert 100 < pongs < paced.FRAMES_EACH_S * (2 + took) + 20_000
        assert ask(port, b"a") == b"a"
        assert not app.ended


def test_who_does_not_read_its_pongs_is_not_read_and_then_cut_off(monkeypatch: Any) -> None:
    """The answers to pings are no more than what any answer may hold."""
    monkeypatch.setattr(paced, "UNREAD_S", 0.5)
    monkeypatch.setattr(paced, "FRAMES_EACH_S", 1e6)
    with running() as (app, port), connected(port, HELLO % b"") as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(OSError, match=r"(?i)reset|broken|abort"):
            flood(client, frame(PING, b"x" * 125) * 1000, 20)
        deadline = time.monotonic() + 20
        while not app.ended and time.monotonic() < deadline:
            time.sleep(0.05)
        assert app.ended
        assert not paced._Stalled._all


def test_what_all_clients_do_not_read_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(paced, "MOST_UNREAD", 2**20)
    with running() as (_, port), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(port, HELLO % b"fill")) for _ in range(12)]
        deadline = time.monotonic() + 20
        while len(paced._Stalled._all) + 4 > len(clients) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        held = [one.transport.get_write_buffer_size() for one in list(paced._Stalled._all)]
        assert 0 < sum(held) <= 2**20 + 2**18
        left = stack.enter_context(connected(port, HELLO % b""))
        left.sendall(frame(PING, b"a"))
        assert left.recv(100) == b"\x8a\x01a"


def test_a_message_that_does_not_end_is_not_waited_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(paced, "MESSAGE_S", 0.5)
    with running() as (app, port):
        for begun in (frame(TEXT, b"abc", first=0), frame(TEXT, b"abcdef")[:-3]):
            with connected(port, HELLO % b"") as client:
                for _ in range(4):  # whole ones do not count
                    client.sendall(frame(TEXT, b"whole"))
                    time.sleep(0.2)
                client.sendall(begun)
                assert client.recv(100)[2:4] == struct.pack(">H", 1008)
                assert client.recv(100) == b""
        assert app.messages == ["whole"] * 8


def test_the_server_ends_soon_whatever_its_clients_do_not_read(monkeypatch: Any) -> None:
    monkeypatch.setattr(paced, "ENDING_S", 0.3)
    with contextlib.ExitStack() as stack:
        with running() as (_, port):
            for _ in range(3):
                stack.enter_context(connected(port, HELLO % b"fill"))
            deadline = time.monotonic() + 20
            while len(paced._Stalled._all) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            started = time.monotonic()
        assert time.monotonic() - started < run.GRACE_S - 1
