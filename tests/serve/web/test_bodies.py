from __future__ import annotations

import pytest

from tests.serve.client import Served
from tests.serve.pictures import png


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
