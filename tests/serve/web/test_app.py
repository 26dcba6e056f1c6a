from __future__ import annotations

import re
import socket
import time
from typing import Any

from onestill.pipeline import Pipeline
from onestill.serve.queue.scheduler import Limits
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


def test_wrong_paths_and_methods_are_told_in_the_same_form(served: Served) -> None:
    assert served.ask("GET", "/v1/nothing").error["code"] == "not_found"
    answer = served.ask("DELETE", "/v1/models")
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD"
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


def _job(n: int = 1) -> Any:
    from onestill.serve.queue.jobs import Job

    return Job("a", tuple(range(n)), 1, 32, 32)
