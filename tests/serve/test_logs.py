from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onestill.pipeline import Pipeline
from onestill.serve import logs
from onestill.serve.logs import LogFormat, LogLevel, log_to_stderr, valid_request_id
from onestill.serve.web.server import Settings
from tests.serve.client import Served, serving

SECRET = "a very private prompt"
LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (\w+) +([\w.]+)((?: \w+=\S+)*)")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """All that is logged so far; the loggers are as before afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("onestill")
    before = root.handlers[:], root.level, ours.level
    found: list[str] = []

    def read() -> str:
        found.append(capsys.readouterr().err)
        return "".join(found)

    root.handlers[:] = []  # those of pytest stay open
    yield read
    root.handlers[:], root.level, ours.level = before


def ask_some(served: Served) -> list[dict[str, Any]]:
    """Requests and what their lines must say."""
    expected = []
    for method, path, route, status in [
        ("GET", "/v1/models/tiny", "/v1/models/{name}", 200),
        ("HEAD", "/healthz", "/healthz", 200),
        ("GET", f"/nothing/{SECRET.replace(' ', '')}", "other", 404),
        ("POST", "/v1/images/generations", "/v1/images/generations", 200),
    ]:
        body = {"prompt": SECRET} if method == "POST" else None
        answer = served.ask(method, path, body, {"authorization": "Bearer os-secret"})
        assert answer.status == status
        name = answer.headers["x-request-id"]
        expected.append({"request_id": name, "method": method, "route": route, "status": status})
    return expected


@pytest.mark.parametrize("form", LogFormat)
def test_each_request_is_a_line(tiny_pipe: Pipeline, said: Callable[[], str], form: LogFormat) -> None:
    log_to_stderr(form, LogLevel.INFO)
    with serving(tiny_pipe) as served:
        expected = ask_some(served)
        with served.live(additional_headers={"x-request-id": "live-1"}) as live:
            assert live.response is not None
            assert live.response.headers["x-request-id"] == "live-1"
    found = []
    for line in said().splitlines():
        if form == LogFormat.JSON:
            entry = json.loads(line)
            assert (entry["level"], entry["logger"]) == ("info", "onestill.serve")
        else:
            match = LINE.fullmatch(line)
            assert match is not None, line
            fields = dict(part.split("=", 1) for part in match[4].split())
            entry = {"time": match[1], "level": match[2], "message": match[3], **fields}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
        if "status" in entry:
            assert float(entry["ms"]) >= 0
            found.append({name: entry[name] for name in ("message", "request_id", "method", "route", "status")})
    live = {"message": "closed", "request_id": "live-1", "method": "GET", "route": "/v1/realtime", "status": 101}
    wanted = [{"message": "answered", **one} for one in expected] + [live]
    assert [{name: str(value) for name, value in one.items()} for one in found] == [
        {name: str(value) for name, value in one.items()} for one in wanted
    ]
    for private in ("private", "os-secret", "127.0.0.1"):
        assert private not in said()


def test_at_the_usual_level_only_faults_are_logged(tiny_pipe: Pipeline, said: Callable[[], str]) -> None:
    def broken(images: Any) -> list[bool]:
        raise RuntimeError("the filter broke")

    log_to_stderr(LogFormat.JSON, LogLevel.WARNING)
    with serving(tiny_pipe, Settings(image_filter=broken)) as served:
        assert served.ask("GET", "/healthz").status == 200
        assert said() == ""
        name = served.draw().headers["x-request-id"]
    (line,) = said().splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["request_id"]) == ("error", name)
    assert entry["exception"].endswith("RuntimeError: the filter broke")


def test_a_message_of_several_lines_is_one_line(said: Callable[[], str]) -> None:
    log_to_stderr(LogFormat.TEXT, LogLevel.INFO)
    logging.getLogger("onestill.serve").warning("one\ntwo")
    logging.getLogger("some.library").info("not of interest")
    text = said()
    assert text.endswith(" warning one two\n")
    assert text.count("\n") == 1


def test_a_request_id_comes_back_if_it_is_a_plain_word(served: Served) -> None:
    for given in ("abc", "0" * 128, "9f86d081-884c-4d65-9a2f-eaa0c55ad015", "Root=1-5f84c7a1:2/x+y@z~"):
        assert valid_request_id(given) == given
        assert served.ask("GET", "/healthz", headers={"x-request-id": given}).headers["x-request-id"] == given
        assert served.ask("GET", "/nothing", headers={"x-request-id": given}).headers["x-request-id"] == given
    seen = set()
    for bad in (None, "", "0" * 129, "a b", 'a"b', "a,b", "ä", "a\tb", "a;b"):
        seen.add(valid_request_id(bad))
        headers = {} if bad is None else {"x-request-id": bad}
        seen.add(served.ask("GET", "/healthz", headers=headers).headers["x-request-id"])
    assert len(seen) == 18
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in seen)
    assert logs.REQUEST_ID.get() == ""


def test_a_request_without_an_id_draws_what_its_answer_names(served: Served) -> None:
    first = served.draw()
    again = served.ask(
        "POST", "/v1/images/generations", {"prompt": "a red apple"}, {"x-request-id": first.headers["x-request-id"]}
    )
    assert again.json["data"] == first.json["data"]
