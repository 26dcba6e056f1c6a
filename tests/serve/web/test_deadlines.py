"""Whatever hangs, every route answers at the deadline, health says so, and the server ends when it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import COOKIE, Access
from onestill.serve.gallery.store import Gallery
from onestill.serve.queue.scheduler import Limits
from onestill.serve.web.server import Settings
from tests.serve.client import Served, answer_on, cookie_of, serving
from tests.serve.conftest import Gated
from tests.serve.pictures import png

HUNG = {"engine_fault", "timeout"}


def codes_of_every_route(served: Served) -> list[str]:
    """The error's code from each way to ask for a picture, all at once."""
    cookie = {"cookie": f"{COOKIE}={cookie_of(served.ask('GET', '/'))}"}
    codes: list[str] = []

    def stream() -> str:
        answer = served.draw(stream=True)
        if answer.status != 200:  # refused before it began
            return str(answer.error["code"])
        body = answer.body.decode()
        assert body.endswith("data: [DONE]\n\n")
        return str(json.loads(body.split("data: ")[1])["error"]["code"])

    def live() -> str:
        with served.live() as socket:
            socket.send('{"id": 1, "prompt": "a"}')
            return str(answer_on(socket)[0]["error"]["code"])

    asking: list[Callable[[], str]] = [
        lambda: str(served.draw().error["code"]),
        lambda: str(served.edit(png()).error["code"]),
        lambda: str(served.ask("POST", "/v1/gallery", {"prompt": "a", "consent": True}, cookie).error["code"]),
        stream,
        live,
    ]
    threads = [threading.Thread(target=lambda ask=ask: codes.append(ask())) for ask in asking]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    return codes


def test_every_route_answers_while_the_engine_hangs(gated: Gated, ledger: Ledger) -> None:
    settings = Settings(limits=Limits(timeout_s=1, stuck_s=0.5, hung_s=1.5, batch=1))
    with serving(Pipeline(gated), settings, Access(ledger=ledger), Gallery(ledger)) as served:
        gated.hold()
        codes = codes_of_every_route(served)
        assert len(codes) == 5
        assert set(codes) <= HUNG
        assert "engine_fault" in codes  # of the one that the engine had begun with
        ready, healthy = (served.ask("GET", route) for route in ("/readyz", "/healthz"))
        assert (ready.status, ready.error["code"]) == (503, "not_ready")
        assert (healthy.status, healthy.error["code"]) == (503, "not_healthy")
        assert "does not answer" in healthy.error["message"]
        assert served.draw().status == 503  # at once
        assert set(codes_of_every_route(served)) == {"engine_fault"}
        gated.gate.set()
        for _ in range(500):
            if served.ask("GET", "/healthz").status == 200:
                break
            time.sleep(0.02)
        assert served.draw(seed=1).status == 200


def test_a_server_ends_while_its_engine_hangs(gated: Gated) -> None:
    answers: list[Any] = []
    with serving(Pipeline(gated), Settings()) as served:
        gated.hold()
        asking = threading.Thread(target=lambda: answers.append(served.draw()))
        asking.start()
        gated.wait_reached()
        ended = time.monotonic()
    assert time.monotonic() - ended < 15  # `serving` waits until the server's thread has ended
    asking.join(20)
    assert (answers[0].status, answers[0].error["code"]) == (503, "closing")


@pytest.mark.parametrize("which", ["prompt_filter", "image_filter"])
def test_a_filter_that_hangs_is_answered_for(tiny_pipe: Pipeline, which: str) -> None:
    go_on = threading.Event()
    hooks: dict[str, Any] = {which: lambda value: go_on.wait(30)}
    with serving(tiny_pipe, Settings(limits=Limits(timeout_s=0.3), **hooks)) as served:
        answer = served.draw()
        go_on.set()
    assert (answer.status, answer.error["code"]) == (503, "timeout")


def test_a_lying_engine_is_answered_for_on_every_route(gated: Gated, ledger: Ledger, monkeypatch: Any) -> None:
    with serving(Pipeline(gated), Settings(), Access(ledger=ledger), Gallery(ledger)) as served:
        decode = gated._engine.decode
        monkeypatch.setattr(gated, "decode", lambda latents: decode(latents)[1:], raising=False)
        assert set(codes_of_every_route(served)) == {"engine_fault"}
