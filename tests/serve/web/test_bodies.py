from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

from onestill.pipeline import Pipeline
from onestill.serve.web.requests import Bounds
from onestill.serve.web.server import Settings
from tests.serve.client import Served, serving
from tests.serve.pictures import png, scan_bomb, slow_jpeg


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"3", b'"a"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "a"', b"NaN"]
)
def test_a_body_that_is_no_object(served: Served, body: bytes) -> None:
    answer = served.ask("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    assert answer.status == 400
    assert answer.error["code"] == "invalid_body"


def test_text_is_no_json_whatever_it_says(served: Served) -> None:
    answer = served.ask("POST", "/v1/images/generations", b'{"prompt": "a"}', {"content-type": "text/plain"})
    assert answer.status == 400
    assert "application/json" in answer.error["message"]


def test_another_model_is_not_found(served: Served) -> None:
    answer = served.draw(model="dall-e-3")
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert served.draw(model="tiny", seed=1).status == 200


def test_a_form_that_is_none(served: Served) -> None:
    for body, kind in [
        (b"garbage", "multipart/form-data"),
        (b"garbage", "multipart/form-data; boundary=XX"),
        (b"--XX\r\n\r\n\r\n--XX--", "multipart/form-data; boundary=XX"),
        (b"{}", "application/json"),
        (b"a=b", "application/x-www-form-urlencoded"),
    ]:
        answer = served.ask("POST", "/v1/images/edits", body, {"content-type": kind})
        assert answer.status == 400, (body, kind)
        assert answer.error["message"]
    assert served.edit(png(), mask="x").error["param"] == "mask"
    assert served.edit(png(), n="two").error["param"] == "n"
    assert served.edit(png(), strength="nan").error["param"] == "strength"
    assert served.edit(png(), strength="0").error["param"] == "strength"


@contextlib.contextmanager
def begun(served: Served, path: str, headers: str, body: bytes) -> Iterator[socket.socket]:
    """A request whose body has begun, and does not go on."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n\r\n".encode() + body)
        yield client


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("content-length: 262145", b""),
        ("transfer-encoding: chunked", b"40001\r\n" + b" " * 0x40001 + b"\r\n"),
    ],
)
def test_json_that_is_too_large_is_refused_before_it_is_read(served: Served, headers: str, body: bytes) -> None:
    headers = f"content-type: application/json\r\n{headers}"
    with begun(served, "/v1/images/generations", headers, body) as client:
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    spaces = b'{"prompt": "a", "seed": 1' + b" " * (2**18 - 26) + b"}"
    assert served.ask("POST", "/v1/images/generations", spaces, {"content-type": "application/json"}).status == 200


def test_forms_have_bounds_together(tiny_pipe: Pipeline, monkeypatch: Any) -> None:
    """They stay in memory, whose bound is one for all; what is refused or leaves gives its part back."""
    monkeypatch.setattr(tempfile, "TemporaryFile", None)  # whatever opens a file on the disk fails
    part = b'--XX\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + bytes(2**20)
    bounds = Bounds(body=3 * 2**20, uploads=2**21 + 4096)
    kind = f"content-type: multipart/form-data; boundary=XX\r\ncontent-length: {2**21}"
    with serving(tiny_pipe, Settings(bounds=bounds)) as served:
        with (
            begun(served, "/v1/images/edits", kind, part) as first,
            begun(served, "/v1/images/edits", kind, part),
        ):
            deadline = time.monotonic() + 20
            while served.server.uploads.held < 2 * len(part) and time.monotonic() < deadline:
                time.sleep(0.01)
            refused = served.edit(bytes(8192))
            assert (refused.status, refused.error["code"]) == (429, "queue_full")
            assert "retry-after" in refused.headers
            first.close()
            while served.server.uploads.held > len(part) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert served.edit(png()).status == 200
        while served.server.uploads.held and time.monotonic() < deadline:
            time.sleep(0.01)
        assert served.server.uploads.held == 0


def test_an_upload_that_takes_long_delays_nobody_and_ends_with_its_client(served: Served) -> None:
    decoder = served.server._decoder
    body = b'--XX\r\ncontent-disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n' + slow_jpeg()
    body += b'\r\n--XX\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na\r\n--XX--\r\n'
    kind = f"content-type: multipart/form-data; boundary=XX\r\ncontent-length: {len(body)}"
    idle = len(decoder._idle)
    with begun(served, "/v1/images/edits", kind, body):
        deadline = time.monotonic() + 20
        while len(decoder._idle) == idle and time.monotonic() < deadline:
            time.sleep(0.01)
        assert served.draw(seed=1).status == 200
        assert served.ask("GET", "/healthz").status == 200
    while len(decoder._idle) < idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(decoder._idle) == idle
    refused = served.edit(scan_bomb())
    assert (refused.status, refused.error["code"]) == (400, "image_too_costly")
