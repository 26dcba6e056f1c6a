"""`Server.draw`: every route checks, draws, encodes and counts in one order."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import COOKIE, Access
from onestill.serve.gallery.store import Gallery
from onestill.serve.web import server as server_module
from onestill.serve.web.messages import pack
from tests.serve.client import Served, answer_on, cookie_of, serving


def refusals(served: Served) -> list[str]:
    """The error's code of one picture from each route, drawn without a start and with one that is no picture."""
    cookie = {"cookie": f"{COOKIE}={cookie_of(served.ask('GET', '/'))}"}
    codes = [
        served.ask("POST", "/v1/images/generations", {"prompt": "a"}, cookie).error["code"],
        served.edit(b"no picture", cookie).error["code"],
        served.ask("POST", "/v1/gallery", {"prompt": "a", "consent": True}, cookie).error["code"],
    ]
    with served.live(additional_headers=cookie) as socket:
        for message in ('{"id": 1, "prompt": "a"}', pack({"id": 2, "prompt": "a"}, b"no picture")):
            socket.send(message)
            codes.append(answer_on(socket)[0]["error"]["code"])
    return codes


def test_beyond_the_quota_no_route_decodes_or_draws(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    access = Access(ledger=ledger, trial=1)
    with serving(tiny_pipe, access=access, gallery=Gallery(ledger)) as served:
        assert served.draw().status == 200
        for _ in range(3):  # each new cookie has a trial of its own, until the address has had four
            cookie = {"cookie": f"{COOKIE}={cookie_of(served.ask('GET', '/'))}"}
            assert served.ask("POST", "/v1/images/generations", {"prompt": "a"}, cookie).status == 200
        assert refusals(served) == ["insufficient_quota"] * 5
        assert served.server.scheduler.counts["drawn"] == 4


def test_a_picture_that_cannot_be_encoded_is_not_counted(
    tiny_pipe: Pipeline, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> bytes:
        raise OSError("no encoder")

    monkeypatch.setattr(server_module, "picture_bytes", broken)
    access = Access(ledger=ledger, trial=1)
    with serving(tiny_pipe, access=access, gallery=Gallery(ledger)) as served:
        codes = refusals(served)
        assert codes == ["server_fault", "invalid_image", "server_fault", "server_fault", "invalid_image"]
        assert b"server_fault" in served.draw(stream=True).body
        assert served.server.scheduler.counts["drawn"] == 4
        monkeypatch.undo()
        assert served.draw().status == 200  # nothing was counted, so the trial of the address is whole
        figures = served.ask("GET", "/metrics").body.decode()
        assert [line for line in figures.splitlines() if line.startswith("onestill_pictures_total")] == [
            'onestill_pictures_total{route="images"} 1'
        ]


def test_a_stream_hands_out_what_the_quota_allows(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    key = ledger.add_key("me", 2)[1]
    headers = {"authorization": f"Bearer {key}"}
    body = {"prompt": "a", "n": 2, "stream": True}
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=0)) as served:
        events = served.ask("POST", "/v1/images/generations", body, headers).body.decode().split("\n\n")
        assert sum(event.startswith("event: image_generation.completed") for event in events) == 2
        refused = served.ask("POST", "/v1/images/generations", body, headers)
        assert (refused.status, json.loads(refused.body)["error"]["code"]) == (429, "insufficient_quota")
