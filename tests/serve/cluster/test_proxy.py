"""The proxy: a server behind it is killed, another comes in its place, and no client loses anything."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from benchmarks.serve.server import running
from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import Access
from onestill.serve.cluster.proxy import Proxy
from onestill.serve.cluster.upstream import ClientFromProxy, Upstream
from onestill.serve.forwarded import TrustedProxies
from onestill.serve.run import ProxySettings, listen, make_proxy_server
from onestill.serve.web.app import create_app
from onestill.serve.web.guard import Guard
from onestill.serve.web.requests import Bounds
from onestill.serve.web.server import Server, Settings
from tests.serve.client import Answer, Served, answer_on, serving
from tests.serve.pictures import png

PROOF = "proof"


@contextmanager
def answering(app: ASGIApp, message_bytes: int, proxy: ProxySettings | None = None) -> Iterator[int]:
    """Yields the port of a server of an application."""
    with listen("127.0.0.1", 0) as bound:
        started = threading.Event()
        server = make_proxy_server(app, message_bytes, proxy, ready=started.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        assert started.wait(20)
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def proxied(port: int, patience_s: float = 60.0, before: ProxySettings | None = None) -> Iterator[Served]:
    """A proxy before whatever listens at a port, and the settings of the proxy before that."""
    bounds = Bounds()
    proxy = Proxy(Upstream("127.0.0.1", port, PROOF, bounds.message, patience_s))
    found = Served.__new__(Served)
    with answering(Guard(proxy, (), (), bounds.body), bounds.message, before) as found.port:
        yield found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def test_what_goes_through_is_what_would_have_come(tiny_pipe: Pipeline) -> None:
    with serving(tiny_pipe) as served, proxied(served.port) as proxy:
        for path in ("/", "/web/page.js", "/v1/models", "/healthz", "/openapi.json", "/nowhere", "/v1/models/x"):
            alone, through = served.ask("GET", path), proxy.ask("GET", path)
            assert (through.status, through.body) == (alone.status, alone.body), path
            assert through.headers["content-security-policy"] == alone.headers["content-security-policy"]
        drawn, again = proxy.draw(seed=3), served.draw(seed=3)
        assert drawn.json["data"] == again.json["data"]
        assert proxy.edit(png(), seed="3").status == 200
        assert proxy.draw(n=11).error["code"] == "invalid_value"
        events = proxy.draw(n=3, seed=1, stream=True)
        assert events.headers["content-type"].startswith("text/event-stream")
        assert events.body.count(b"event: image_generation.completed") == 3
        assert events.body.endswith(b"data: [DONE]\n\n")
        evil = {"origin": "https://evil.example"}
        assert proxy.ask("POST", "/v1/images/generations", {"prompt": "a"}, evil).status == 403
        assert proxy.ask("GET", "/", headers={"host": "evil.example"}).status == 403
        with proxy.live(subprotocols=["onestill.v1"]) as live:
            assert live.subprotocol == "onestill.v1"
            for name in range(3):
                live.send(json.dumps({"id": name, "prompt": "a", "seed": name}))
                header, data = answer_on(live)
                assert (header["type"], header["id"], header["seed"]) == ("image", name, name)
                assert data.startswith(b"\xff\xd8")
            live.send("{")
            assert answer_on(live)[0]["error"]["code"] == "invalid_body"
        with (
            pytest.raises((ConnectionClosed, InvalidStatus)),
            connect(f"ws://127.0.0.1:{proxy.port}/v1/nothing", proxy=None) as live,
        ):
            live.recv(timeout=20)


def test_a_replica_knows_who_asked_and_below_which_path(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    server = Server(tiny_pipe, Settings(), Access(ledger=ledger, trial=1))
    app = create_app(server)
    app.add_middleware(ClientFromProxy, proof=PROOF)
    before = ProxySettings(TrustedProxies("127.0.0.1"), "/draw")
    said = {"x-forwarded-proto": "https", "x-onestill-client": "3.3.3.3", "x-onestill-root-path": "/evil"}
    with answering(app, server.bounds.message) as port, proxied(port, before=before) as proxy:

        def ask(method: str, path: str, client: str, body: Any = None) -> Answer:
            return proxy.ask(method, path, body, said | {"x-forwarded-for": client, "x-request-id": "abc"})

        for path in ("/", "/draw/"):  # the path taken off by the proxy before, and left there
            page = ask("GET", path, "1.1.1.1")
            assert b'"/draw/web/page.js"' in page.body
            assert "Path=/draw; SameSite=strict; Secure" in page.headers["set-cookie"]
            assert page.headers["x-request-id"] == "abc"
        assert ask("GET", "/draw/openapi.json", "1.1.1.1").json["servers"] == [{"url": "/draw"}]
        assert ask("HEAD", "/draw/v1/models", "1.1.1.1").status == 200
        assert ask("GET", "/draw/metrics", "1.1.1.1").status == 403
        drawn = [
            ask("POST", "/draw/v1/images/generations", client, {"prompt": "a"}).status
            for client in ("1.1.1.1", "2.2.2.2", "1.1.1.1")
        ]
        assert drawn == [200, 200, 429]
        with connect(f"ws://127.0.0.1:{proxy.port}/draw/v1/realtime", proxy=None) as live:
            assert json.loads(live.recv(timeout=60))["type"] == "ready"
    server.close()


def test_one_request_is_one_picture_however_often_it_is_asked(served: Served) -> None:
    headers = {"x-request-id": "abc"}
    one, two = (served.ask("POST", "/v1/images/generations", {"prompt": "a"}, headers).json["data"] for _ in range(2))
    assert one == two
    assert served.draw().json["data"] != one
    assert served.ask("POST", "/v1/images/generations", {"prompt": "a", "seed": 1}, headers).json["data"] != one


def test_a_request_that_fails_is_asked_once(tiny_pipe: Pipeline) -> None:
    asked: list[int] = []

    def broken(images: Any) -> list[bool]:
        asked.append(len(images))
        raise RuntimeError

    with serving(tiny_pipe, Settings(image_filter=broken)) as served, proxied(served.port, patience_s=2) as proxy:
        answer = proxy.draw()
        assert (answer.status, answer.error["code"]) == (500, "server_fault")
        assert asked == [1]


def test_nobody_answers(tiny_pipe: Pipeline) -> None:
    with proxied(free_port(), patience_s=0.3) as proxy:
        answer = proxy.draw()
        assert (answer.status, answer.error["code"]) == (503, "closing")
        assert "retry-after" in answer.headers
        with pytest.raises((ConnectionClosed, InvalidStatus)), proxy.live():
            pass


@pytest.mark.slow
def test_a_server_is_killed_and_nothing_accepted_is_lost(tiny_folder: Path) -> None:
    port = free_port()
    options = ["--model", str(tiny_folder), "--threads", "1", "--port", str(port)]
    statuses: Counter[int] = Counter()
    ended = threading.Event()

    def draw(proxy: Served) -> None:
        """No client tries anything twice."""
        while not ended.is_set():
            statuses[proxy.draw(num_inference_steps=4).status] += 1

    def stream(proxy: Served, found: list[Any], seen: threading.Event) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=120)
        body = json.dumps({"prompt": "a", "n": 10, "num_inference_steps": 50, "stream": True})
        connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                found.append(json.loads(line[6:]))
                seen.set()
            elif line.startswith(b"data: [DONE]"):
                found.append("done")
        connection.close()

    with proxied(port) as proxy, running(options) as first:
        threads = [threading.Thread(target=draw, args=(proxy,)) for _ in range(3)]
        found: list[Any] = []
        seen = threading.Event()
        threads.append(threading.Thread(target=stream, args=(proxy, found, seen)))
        with proxy.live() as live:
            for name in range(3):
                live.send(json.dumps({"id": name, "prompt": "a", "num_inference_steps": 50}))
            for thread in threads:
                thread.start()
            assert seen.wait(60)
            first.stop(signal.SIGKILL)
            live.send(json.dumps({"id": 3, "prompt": "the last words", "seed": 5}))
            with running(options):
                answers = [answer_on(live)[0] for _ in range(4)]
                time.sleep(1)
                ended.set()
                for thread in threads:
                    thread.join(120)
    assert sorted(answer["id"] for answer in answers) == [0, 1, 2, 3]
    assert (answers[-1]["id"], answers[-1]["type"], answers[-1]["seed"]) == (3, "image", 5)
    assert set(statuses) == {200}
    assert found[-1] == "done"
    seeds = [event["seed"] for event in found[:-1]]
    assert sorted(seeds) == list(range(min(seeds), min(seeds) + 10))  # each once, the killed server's too
