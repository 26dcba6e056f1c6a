from __future__ import annotations

import socket
from typing import Any

import pytest

from onestill.pipeline import Pipeline
from onestill.serve.web import guard
from onestill.serve.web.server import Settings
from tests.serve.client import Served, serving


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "", "localhost@evil.example", "a b", "[::1", "x/y"]
)
def test_a_forged_host_is_refused(served: Served, host: str) -> None:
    answer = served.ask("GET", "/", headers={"host": host})
    assert answer.status in (400, 403)
    if answer.status == 403:
        assert answer.error["code"] == "unknown_host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:80", "192.168.1.7"])
def test_names_that_cannot_be_rebound_are_known(served: Served, host: str) -> None:
    assert served.ask("GET", "/healthz", headers={"host": host}).status == 200


def test_a_foreign_origin_may_look_but_not_ask(served: Served) -> None:
    body = {"prompt": "a"}
    for origin in ("https://evil.example", "null", "http://[", "http://127.0.0.1:1", "http://127.0.0.1.evil.example"):
        answer = served.ask("POST", "/v1/images/generations", body, {"origin": origin})
        assert (answer.status, answer.error["code"]) == (403, "foreign_origin"), origin
        assert "access-control-allow-origin" not in answer.headers
    assert served.ask("POST", "/v1/images/generations", body, {"origin": served.url}).status == 200


def test_hosts_and_origins_can_be_allowed(tiny_pipe: Pipeline) -> None:
    settings = Settings(hosts=("draw.example",), origins=("https://app.example",))
    with serving(tiny_pipe, settings) as served:
        headers = {"host": "draw.example", "origin": "https://app.example"}
        assert served.ask("POST", "/v1/images/generations", {"prompt": "a"}, headers).status == 200


def test_a_page_of_an_allowed_origin_can_ask_and_read(tiny_pipe: Pipeline) -> None:
    path, page, evil = "/v1/images/generations", {"origin": "https://app.example"}, {"origin": "https://evil.example"}
    wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    with serving(tiny_pipe, Settings(origins=("https://app.example/",))) as served:
        preflight = served.ask("OPTIONS", path, headers=page | wanted)
        assert preflight.status == 204
        assert "POST" in preflight.headers["access-control-allow-methods"]
        allowed = preflight.headers["access-control-allow-headers"].lower().split(", ")
        assert {"authorization", "content-type"} <= set(allowed)
        answers = [
            preflight,
            served.ask("POST", path, {"prompt": "a"}, page),
            served.ask("GET", "/v1/models", None, page),
        ]
        answers.append(served.ask("POST", path, {"prompt": ""}, page))
        assert [answer.status for answer in answers] == [204, 200, 200, 400]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
            assert "access-control-allow-credentials" not in answer.headers
            assert answer.headers["vary"] == "Origin"
        others = [served.ask("OPTIONS", path, headers=evil | wanted), served.ask("GET", "/v1/models", None, evil)]
        others += [
            served.ask("GET", "/v1/models"),
            served.ask("OPTIONS", path, headers=page | {"host": "evil.example"}),
        ]
        assert [answer.status for answer in others] == [405, 200, 200, 403]
        for answer in others[:3]:
            assert "access-control-allow-origin" not in answer.headers
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            assert answer.headers["vary"] == "Origin"


def test_every_answer_says_what_a_browser_may_do_with_it(served: Served) -> None:
    for path in ("/", "/v1/models", "/nowhere", "/healthz"):
        headers = served.ask("GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "server" not in headers


def test_a_body_that_never_ends_is_not_waited_for(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setattr(guard, "BODY_S", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_body_of_ten_megabytes_is_refused_unread(served: Served) -> None:
    answer = served.draw(prompt="a" * 13_000_000)
    assert (answer.status, answer.error["code"]) == (413, "too_large")
