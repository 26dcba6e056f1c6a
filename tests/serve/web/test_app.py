from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from typing import Any

import pytest

from onestill.pipeline import Pipeline
from onestill.serve import run
from onestill.serve.queue.scheduler import Limits
from onestill.serve.web import guard
from onestill.serve.web.server import Settings
from tests.serve.client import Served, serving
from tests.serve.conftest import Gated


def test_models_tell_what_can_be_asked(served: Served) -> None:
    listed = served.ask("GET", "/v1/models").json
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["size"], model["sizes"]) == ("tiny", "32x32", ["32x32"])
    assert served.ask("GET", "/v1/models/tiny").json == model
    assert served.ask("GET", "/v1/models/other").error["code"] == "model_not_found"


def test_alive_ready_and_figures(served: Served) -> None:
    assert served.ask("GET", "/healthz").json == {"status": "ok"}
    assert served.ask("GET", "/readyz").json == {"status": "ready"}
    secret = "a very private prompt"
    assert served.draw(prompt=secret, seed=1).status == 200
    assert served.ask("GET", "/nothing/here").status == 404
    figures = served.ask("GET", "/metrics")
    text = figures.body.decode()
    assert figures.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert re.search(r'^onestill_pictures_total\{route="images"\} [1-9]', text, re.M)
    assert re.search(r'^onestill_stage_seconds_bucket\{stage="denoise",le="\+Inf"\} [1-9]', text, re.M)
    assert re.search(r'^onestill_scheduler_total\{event="drawn"\} [1-9]', text, re.M)
    assert re.search(r"^onestill_ready 1$", text, re.M)
    assert "private" not in text
    assert "nothing" not in text  # what someone sent is never a label
    for line in text.splitlines():
        assert re.fullmatch(r'#( \S+){2} .+|[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [-+0-9.eE]+', line), line


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


def test_wrong_paths_and_methods_are_told_in_the_same_form(served: Served) -> None:
    assert served.ask("GET", "/v1/nothing").error["code"] == "not_found"
    answer = served.ask("DELETE", "/v1/models")
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"
    for path in ("/web/../app.py", "/web/%2e%2e%2fapp.py", "/web/..%5capp.py", "//etc/passwd", "/web/index.html%00"):
        assert served.ask("GET", path).status == 404


def test_the_queue_is_bounded_and_says_when_to_come_again(gated: Gated) -> None:
    with serving(Pipeline(gated), Settings(limits=Limits(waiting=8, waiting_each=8))) as served:
        gated.hold()
        first = served.server.scheduler.submit(_job(), "x")
        gated.wait_reached()
        waiting = served.server.scheduler.submit(_job(8), "x")
        answer = served.draw(n=1)
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        gated.gate.set()
        first.result(20)
        waiting.result(20)
        assert served.draw(n=1).status == 200


def test_a_client_that_leaves_withdraws_its_request(gated: Gated) -> None:
    with serving(Pipeline(gated), Settings()) as served:
        gated.hold()
        body = b'{"prompt": "a red apple", "num_inference_steps": 50}'
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
            )
            gated.wait_reached()
        time.sleep(0.3)
        gated.gate.set()
        assert served.draw(seed=1).status == 200
        assert len(gated.batches) <= 3


def test_an_engine_that_fails_is_503_and_says_nothing_of_its_inside(gated: Gated) -> None:
    with serving(Pipeline(gated), Settings()) as served:
        gated.fail = lambda batch: RuntimeError("/secret/path died")
        answer = served.draw()
        assert (answer.status, answer.error["code"]) == (503, "engine_fault")
        assert b"secret" not in answer.body
        for _ in range(2):
            served.draw()
        assert served.ask("GET", "/readyz").status == 503
        assert served.ask("GET", "/healthz").status == 200


def test_a_body_that_never_ends_is_not_waited_for(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setattr(guard, "BODY_S", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


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
    monkeypatch.setattr(run, "UNREAD_S", 0.3)
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


def _job(n: int = 1) -> Any:
    from onestill.serve.queue.jobs import Job

    return Job("a", tuple(range(n)), 1, 32, 32)
