"""The server behind a real reverse proxy, below a path, and what a proxy says that is believed."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.sync.client import connect

from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import COOKIE, Access
from onestill.serve.forwarded import TrustedProxies
from onestill.serve.gallery.store import Gallery
from onestill.serve.run import ProxySettings
from onestill.serve.web.server import Settings
from tests.serve.client import Served, answer_on, cookie_of, serving
from tests.serve.reverse_proxy import reverse_proxy

BELOW = "/draw"
# Who tells the server where it is: the operator, or a proxy that is trusted. A proxy may take the path off or leave it.
SETUPS = {
    "stripped": (ProxySettings(root_path=BELOW), True, {}),
    "left": (ProxySettings(root_path=BELOW), False, {}),
    "told": (ProxySettings(TrustedProxies("127.0.0.1")), True, {"x-forwarded-prefix": BELOW}),
    "told and left": (ProxySettings(TrustedProxies("*")), False, {"x-forwarded-prefix": BELOW}),
}


@contextmanager
def behind(pipe: Pipeline, setup: str, **options: Any) -> Iterator[Served]:
    """The proxy, asked as the server is."""
    proxy, strip, headers = SETUPS[setup]
    with serving(pipe, proxy=proxy, **options) as served, reverse_proxy(served.port, BELOW, strip, headers) as port:
        yield Served(served.server, port)


@pytest.mark.parametrize("setup", SETUPS)
def test_the_page_and_the_api_work_below_a_path(tiny_pipe: Pipeline, setup: str) -> None:
    with behind(tiny_pipe, setup) as proxy:
        page = proxy.ask("GET", f"{BELOW}/").body.decode()
        parts = re.findall(r'(?:href|src)="(/[^"]*)"', page)
        assert len(parts) == 3
        for part in parts:
            answer = proxy.ask("GET", part)
            assert (answer.status, part.startswith(f"{BELOW}/web/")) == (200, True)
            # What a script imports, it names beside itself.
            assert re.findall(r'from "(?!\./)', answer.body.decode()) == []
            assert not re.search(r'["`]/(v1|web)/', answer.body.decode())
        for path in ("/v1/models", "/healthz", "/readyz", "/openapi.json"):
            assert proxy.ask("GET", BELOW + path).status == 200
        assert proxy.ask("GET", f"{BELOW}/openapi.json").json["servers"] == [{"url": BELOW}]
        drawn = proxy.ask("POST", f"{BELOW}/v1/images/generations", {"prompt": "a"}, {"origin": proxy.url})
        assert drawn.status == 200
        with connect(f"ws://127.0.0.1:{proxy.port}{BELOW}/v1/realtime", proxy=None, origin=proxy.url) as live:  # type: ignore[arg-type]
            assert json.loads(live.recv(timeout=60))["type"] == "ready"
            live.send('{"id": 1, "prompt": "a"}')
            assert answer_on(live)[0]["type"] == "image"
        wrong = proxy.ask("DELETE", f"{BELOW}/v1/models")
        assert (wrong.status, wrong.headers["allow"]) == (405, "GET, HEAD")
        assert proxy.ask("GET", f"{BELOW}/nothing").error["code"] == "not_found"
        if setup in ("left", "told and left"):
            moved = proxy.ask("GET", BELOW)
            assert (moved.status, moved.headers["location"]) == (308, f"{BELOW}/")


@pytest.mark.parametrize("setup", ["stripped", "told and left"])
def test_the_gallery_works_below_a_path(tiny_pipe: Pipeline, ledger: Ledger, setup: str) -> None:
    with behind(tiny_pipe, setup, access=Access(ledger=ledger, trial=9), gallery=Gallery(ledger)) as proxy:
        page = proxy.ask("GET", f"{BELOW}/")
        assert f"Path={BELOW};" in page.headers["set-cookie"] + ";"
        cookie = {"cookie": f"{COOKIE}={cookie_of(page)}"}
        saved = proxy.ask("POST", f"{BELOW}/v1/gallery", {"prompt": "a", "consent": True}, cookie)
        assert saved.status == 201
        (entry,) = proxy.ask("GET", f"{BELOW}/v1/gallery", headers=cookie).json["data"]
        assert (entry, entry["mine"]) == (saved.json, True)
        assert entry["url"].startswith(f"{BELOW}/v1/gallery/")
        assert proxy.ask("GET", entry["url"]).headers["content-type"] == "image/webp"
        assert proxy.ask("HEAD", entry["url"]).status == 200
        assert proxy.ask("DELETE", f"{BELOW}/v1/gallery/{entry['id']}", headers=cookie).status == 204


def test_metrics_do_not_go_through_a_proxy(tiny_pipe: Pipeline) -> None:
    said = {"x-forwarded-for": "1.1.1.1"}
    for proxy, headers in [
        (ProxySettings(), said),  # a proxy on this machine of which the operator said nothing
        (ProxySettings(), {"via": "1.1 proxy"}),
        (ProxySettings(TrustedProxies("127.0.0.1")), said),
        (ProxySettings(TrustedProxies("127.0.0.1")), {"x-forwarded-for": "127.0.0.1"}),
        (ProxySettings(TrustedProxies("127.0.0.1")), said | {"forwarded": "for=127.0.0.1"}),
    ]:
        with serving(tiny_pipe, proxy=proxy) as served, reverse_proxy(served.port, headers=headers) as port:
            assert Served(served.server, port).ask("GET", "/metrics").status == 403
            assert served.ask("GET", "/metrics").status == 200
    with serving(tiny_pipe, Settings(metrics_for_all=True)) as served, reverse_proxy(served.port, headers=said) as port:
        assert Served(served.server, port).ask("GET", "/metrics").status == 200


def test_visitors_are_told_apart_by_what_the_proxy_appends(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    proxy = ProxySettings(TrustedProxies("*"))
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=1), proxy=proxy) as served:

        def status(said: str) -> int:
            headers = {"x-forwarded-for": said}
            return served.ask("POST", "/v1/images/generations", {"prompt": "a"}, headers).status

        assert [status("1.1.1.1"), status("2.2.2.2")] == [200, 200]
        # A new address on the left is the client's invention and no new trial.
        assert [status("9.9.9.9, 1.1.1.1"), status("8.8.8.8, 7.7.7.7, 2.2.2.2")] == [429, 429]


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("draw.example:443", "https://draw.example"),
        ("draw.example", "https://draw.example:443"),
        ("draw.example:80", "http://draw.example"),
        ("draw.example:80", "https://draw.example"),  # nginx's $proxy_port
        ("DRAW.example:8443", "https://draw.example:8443"),
    ],
)
def test_a_default_port_is_no_other_origin(tiny_pipe: Pipeline, host: str, origin: str) -> None:
    with serving(tiny_pipe, Settings(hosts=("draw.example",)), proxy=ProxySettings(TrustedProxies("*"))) as served:
        headers = {"host": host, "origin": origin, "x-forwarded-proto": "https", "x-forwarded-for": "1.1.1.1"}
        assert served.ask("POST", "/v1/images/generations", {"prompt": "a"}, headers).status == 200
        for foreign in ("https://draw.example:8444", "https://draw.example.evil", "https://evil.example:443"):
            answer = served.ask("POST", "/v1/images/generations", {"prompt": "a"}, headers | {"origin": foreign})
            assert answer.status == 403


def test_head_is_get_without_a_body(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    with serving(tiny_pipe, access=Access(ledger=ledger), gallery=Gallery(ledger)) as served:
        paths = (
            "/",
            "/web/page.js",
            "/healthz",
            "/readyz",
            "/metrics",
            "/openapi.json",
            "/v1/models",
            "/v1/models/tiny",
        )
        for path in (*paths, "/v1/gallery", "/nowhere", "/web/nothing", "/v1/models/x"):
            full, head = served.ask("GET", path), served.ask("HEAD", path)
            assert (head.status, head.body) == (full.status, b"")
            if path not in ("/metrics",):  # which has other figures by then
                assert head.headers["content-length"] == full.headers["content-length"] == str(len(full.body))
                assert head.headers.get("etag") == full.headers.get("etag")
        assert served.ask("HEAD", "/v1/images/generations").status == 405
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        for _ in range(3):  # nothing of a body is left over on the connection
            connection.request("HEAD", "/")
            assert connection.getresponse().read() == b""
        connection.close()


def test_a_monitor_may_ask_in_http_1_0(served: Served) -> None:
    for head, status in [
        (b"GET /healthz HTTP/1.0\r\n\r\n", b"200"),
        (b"HEAD /healthz HTTP/1.0\r\n\r\n", b"200"),
        (b"GET /readyz HTTP/1.0\r\nhost: localhost\r\n\r\n", b"200"),
        (b"GET /healthz HTTP/1.0\r\nhost: evil.example\r\n\r\n", b"403"),
        (b"GET /healthz HTTP/1.0\r\nhost:\r\n\r\n", b"403"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", b"400"),
    ]:
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
            client.sendall(head)
            answer = b""
            while more := client.recv(4096):
                answer += more
            assert answer.split(b" ")[1] == status, head
