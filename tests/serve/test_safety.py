from __future__ import annotations

from typing import Any

import pytest

from onestill.pipeline import Pipeline
from onestill.serve.safety import blocked_words
from onestill.serve.web.server import Settings
from tests.serve.client import answer_on, serving


def test_words_that_are_blocked_are_not_drawn(tiny_pipe: Pipeline, tmp_path: Any) -> None:
    (tmp_path / "words.txt").write_text("# mine\nnuclear toaster\n")
    settings = Settings(
        prompt_filter=blocked_words(tmp_path / "words.txt"), image_filter=lambda images: [False for _ in images]
    )
    with serving(tiny_pipe, settings) as guarded:
        refused = guarded.draw(prompt="a NUCLEAR\ttoaster")
        assert (refused.status, refused.error["code"]) == (400, "moderation_blocked")
        assert guarded.draw(prompt="a nuclear toasters").status == 200
        assert guarded.server.scheduler.counts["drawn"] == 1


@pytest.mark.parametrize(
    ("prompt", "refused"),
    [
        *((prompt, True) for prompt in ("an Apple", "ap\u200bple", "\u00e1ppl\u00e9", "ap\u0301ple", "ap\u00adple")),
        *(
            (prompt, True)
            for prompt in ("ap\x1cple", "ap\ue000ple", "ap\ufffdple", "\uff41pple", "a\tCRE\u0300ME\nbrulee")
        ),
        *((prompt, False) for prompt in ("apples", "ap ple", "ap\tple", "pineapple", "a creme")),
    ],
    ids=ascii,
)
def test_a_blocked_word_is_found_however_it_is_written(tmp_path: Any, prompt: str, refused: bool) -> None:
    (tmp_path / "words.txt").write_text("apple\ncr\u00e8me br\u00fbl\u00e9e\n\u200b\n", encoding="utf-8")
    assert (blocked_words(tmp_path / "words.txt")(prompt) is not None) is refused


def test_a_filter_that_fails_is_500_in_the_form_of_every_answer(tiny_pipe: Pipeline) -> None:
    def broken(images: Any) -> list[bool]:
        raise RuntimeError("/secret/path")

    with serving(tiny_pipe, Settings(image_filter=broken)) as guarded:
        answer = guarded.draw()
        assert (answer.status, answer.error["code"], answer.error["type"]) == (500, "server_fault", "server_error")
        assert b"secret" not in answer.body
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert len(answer.headers["x-request-id"]) == 16
        figures = guarded.ask("GET", "/metrics").body.decode()
        assert 'onestill_http_requests_total{route="/v1/images/generations",status="500"} 1' in figures
        streamed = guarded.draw(stream=True).body
        assert b"server_fault" in streamed
        assert streamed.endswith(b"data: [DONE]\n\n")


def test_a_picture_that_a_filter_refuses_is_not_shown(tiny_pipe: Pipeline) -> None:
    with serving(tiny_pipe, Settings(image_filter=lambda images: [True for _ in images])) as guarded:
        assert guarded.draw().error["code"] == "moderation_blocked"
        assert b"moderation_blocked" in guarded.draw(stream=True).body
        with guarded.live() as socket:
            socket.send('{"id": 1, "prompt": "a"}')
            assert answer_on(socket)[0]["error"]["code"] == "moderation_blocked"
