"""A server in a thread of the test, and the plainest clients there are."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from onestill.pipeline import Pipeline
from onestill.serve.access.quota import COOKIE, Access
from onestill.serve.gallery.store import Gallery
from onestill.serve.run import ProxySettings, listen, make_server
from onestill.serve.web.messages import unpack
from onestill.serve.web.server import Server, Settings


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The error object, its envelope checked."""
        (name, error), *rest = self.json.items()
        assert (name, rest) == ("error", [])
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].count("\n") == 0
        return error


class Served:
    """A running server and how to ask it."""

    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Answer:
        """One request; a body that is no bytes is sent as JSON."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("content-type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def draw(self, **fields: Any) -> Answer:
        return self.ask("POST", "/v1/images/generations", {"prompt": "a red apple", **fields})

    def edit(self, image: bytes, headers: Mapping[str, str] | None = None, **fields: str) -> Answer:
        parts = [b'--XX\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + image + b"\r\n"]
        for name, value in {"prompt": "a red apple", **fields}.items():
            parts.append(f'--XX\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
        all_headers = {"content-type": "multipart/form-data; boundary=XX", **(headers or {})}
        return self.ask("POST", "/v1/images/edits", b"".join(parts) + b"--XX--\r\n", all_headers)

    @contextmanager
    def live(self, ready: bool = True, **options: Any) -> Iterator[ClientConnection]:
        """A live connection, its `ready` already read."""
        with connect(
            f"ws://127.0.0.1:{self.port}/v1/realtime", max_size=2**24, compression=None, proxy=None, **options
        ) as socket:
            if ready:
                assert json.loads(socket.recv(timeout=60))["type"] == "ready"
            yield socket


def cookie_of(answer: Answer) -> str:
    """The signed cookie that the page came with."""
    found = re.match(rf"{COOKIE}=([^;]+); ", answer.headers["set-cookie"])
    assert found is not None
    return found[1]


def answer_on(socket: ClientConnection, timeout: float = 60) -> tuple[dict[str, Any], bytes]:
    """The next answer: its object, and the bytes of its pictures."""
    message = socket.recv(timeout=timeout)
    if isinstance(message, str):
        return json.loads(message), b""
    header, data = unpack(message)
    return header, data


@contextmanager
def serving(
    pipe: Pipeline,
    settings: Settings | None = None,
    access: Access | None = None,
    gallery: Gallery | None = None,
    proxy: ProxySettings | None = None,
) -> Iterator[Served]:
    bound = listen("127.0.0.1", 0)
    port = bound.getsockname()[1]
    server = Server(pipe, settings or Settings(), access, gallery)
    started = threading.Event()
    running = make_server(server, proxy, ready=started.set)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert started.wait(30)
        yield Served(server, port)
    finally:
        running.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


def kept(folder: Path) -> bytes:
    """All that is on the disk, the database's log included."""
    return b"".join(file.read_bytes() for file in folder.iterdir())
