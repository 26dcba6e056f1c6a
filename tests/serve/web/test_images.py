from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from onestill.pipeline import Pipeline
from onestill.pipeline.picture import fitted
from onestill.serve.queue.jobs import Picture
from onestill.serve.web.images import _Events
from onestill.serve.web.requests import read_upload
from tests.serve.client import Served


def opened(data: str) -> Any:
    return PIL.Image.open(io.BytesIO(base64.b64decode(data)))


def png(size: tuple[int, int] = (40, 20), colour: str = "red") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_the_pictures_are_the_pipelines_and_carry_their_parameters(served: Served, tiny_pipe: Pipeline) -> None:
    answer = served.draw(n=2, seed=5)
    assert answer.status == 200
    assert answer.json["size"] == "32x32"
    assert [one["seed"] for one in answer.json["data"]] == [5, 6]
    alone = tiny_pipe("a red apple", seed=5, num_images_per_prompt=2)
    for one, image in zip(answer.json["data"], alone.images, strict=True):
        picture = opened(one["b64_json"])
        assert np.abs(np.asarray(picture, np.int16) - np.asarray(image, np.int16)).max() <= 1
        assert picture.text["prompt"] == "a red apple"
        assert picture.text["seed"] == str(one["seed"])
    assert set(answer.json["timings"]) == {"queue_ms", "encode_ms", "denoise_ms", "decode_ms"}
    assert len(answer.headers["x-request-id"]) == 16


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(served: Served, kind: str, name: str) -> None:
    data = served.draw(output_format=kind, output_compression=60, response_format="url", seed=1).json["data"][0]
    head, _, text = data["url"].partition(",")
    assert head == f"data:image/{kind};base64"
    picture = opened(text)
    assert picture.format == name
    if kind != "png":
        assert picture.getexif()[0x010E].startswith("a red apple\n")


def test_a_stream_is_one_event_a_picture(served: Served) -> None:
    answer = served.draw(n=3, seed=1, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    seeds = []
    for event in events:
        name, _, data = event.partition("\n")
        assert name == "event: image_generation.completed"
        found = json.loads(data.removeprefix("data: "))
        seeds.append(found["seed"])
        assert opened(found["b64_json"]).size == (32, 32)
    assert sorted(seeds) == [1, 2, 3]


def test_an_edit_starts_from_the_picture(served: Served, tiny_pipe: Pipeline) -> None:
    answer = served.edit(png(), seed="3", strength="0.4", num_inference_steps="4")
    assert answer.status == 200
    image = PIL.Image.new("RGB", (40, 20), "red")
    same = tiny_pipe("a red apple", image=image, strength=0.4, num_inference_steps=4, seed=3).images[0]
    found = np.asarray(opened(answer.json["data"][0]["b64_json"]), np.int16)
    assert np.abs(found - np.asarray(same, np.int16)).max() <= 1
    assert b"event: image_edit.completed" in served.edit(png(), stream="true").body


def test_an_upload_is_fitted_before_it_waits(served: Served) -> None:
    """A turned and transparent one as the pipeline would do it, and the pipeline changes nothing more."""
    ramp = np.add.outer(np.arange(300), np.arange(500)).astype(np.uint8)
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    PIL.Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp, ramp], 2), "RGBA").save(file, "PNG", exif=exif)
    for size in (None, "auto", "32x32"):
        form = served.server.forms.live(id=1, prompt="a", size=size)
        image = read_upload(file.getvalue(), form, served.server.info, 150_000)
        assert (image.size, image.mode) == ((32, 32), "RGB")
        with PIL.Image.open(file) as upload:
            np.testing.assert_array_equal(image, fitted(upload, 32, 32))
        np.testing.assert_array_equal(image, fitted(image, 32, 32))


WRONG: list[tuple[Any, str | None]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": " \n"}, "prompt"),
    ({"prompt": "\x1c\x1d"}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "a" * 4001}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({}, "prompt"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 11}, "n"),
    ({"prompt": "a", "n": "1"}, "n"),
    ({"prompt": "a", "n": True}, "n"),
    ({"prompt": "a", "n": 1e400}, "n"),
    ({"prompt": "a", "n": float("nan")}, "n"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": 2**64}, "seed"),
    ({"prompt": "a", "seed": 10**400}, "seed"),
    ({"prompt": "a", "seed": 0.5}, "seed"),
    ({"prompt": "a", "size": "64x64"}, "size"),
    ({"prompt": "a", "size": "32x32x32"}, "size"),
    ({"prompt": "a", "num_inference_steps": 51}, "num_inference_steps"),
    ({"prompt": "a", "output_format": "gif"}, "output_format"),
    ({"prompt": "a", "output_compression": 101}, "output_compression"),
    ({"prompt": "a", "background": "transparent"}, "background"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "num_inference_step": 1}, "num_inference_step"),
    ({"prompt": "a", "\ud800": 1}, None),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda value: ascii(value)[:40])
def test_a_wrong_field_is_named(served: Served, body: Any, param: str | None) -> None:
    answer = served.ask("POST", "/v1/images/generations", body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert answer.error["type"] == "invalid_request_error"


def test_a_mistyped_name_is_corrected(served: Served) -> None:
    assert "Did you mean 'num_inference_steps'?" in served.draw(num_inference_step=1).error["message"]


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


def test_a_body_of_ten_megabytes_is_refused_unread(served: Served) -> None:
    answer = served.draw(prompt="a" * 13_000_000)
    assert (answer.status, answer.error["code"]) == (413, "too_large")


def bomb() -> bytes:
    """A PNG of a kilobyte that claims 30000 x 30000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 500_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("P", (8, 8)).save(file, "GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (bomb(), "image_too_large"),
        (png((4000, 20)), "image_too_large"),  # 200 : 1
        (png()[:60], "invalid_image"),
        (png()[:-40], "invalid_image"),
        (b"", "invalid_image"),
        (b"GIF89a<script>alert(1)</script>", "invalid_image"),
        (gif(), "invalid_image"),
        (b"%PDF-1.4\n" + png(), "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image"),
    ],
)
def test_an_upload_that_is_no_safe_picture(served: Served, data: bytes, code: str) -> None:
    assert len(bomb()) < 2000
    answer = served.edit(data)
    assert (answer.status, answer.error["code"]) == (400, code)


def test_what_is_appended_to_a_picture_does_not_come_back(served: Served) -> None:
    answer = served.edit(png() + b"<script>alert(1)</script>PK\x03\x04", strength="0.1")
    assert answer.status == 200
    assert b"script" not in base64.b64decode(answer.json["data"][0]["b64_json"])


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


def test_words_that_are_blocked_are_not_drawn(tiny_pipe: Pipeline, tmp_path: Any) -> None:
    from onestill.serve.safety import blocked_words
    from onestill.serve.web.server import Settings
    from tests.serve.client import serving

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
    from onestill.serve.safety import blocked_words

    (tmp_path / "words.txt").write_text("apple\ncr\u00e8me br\u00fbl\u00e9e\n\u200b\n", encoding="utf-8")
    assert (blocked_words(tmp_path / "words.txt")(prompt) is not None) is refused


def test_a_filter_that_fails_is_500_in_the_form_of_every_answer(tiny_pipe: Pipeline) -> None:
    from onestill.serve.web.server import Settings
    from tests.serve.client import serving

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


def test_a_stream_whose_client_left_before_it_began_is_withdrawn() -> None:
    future: Future[list[Picture]] = Future()
    began = False

    async def events() -> AsyncIterator[bytes]:
        nonlocal began
        began = True
        yield b""

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(20)

    asyncio.run(_Events(events(), future)({"type": "http"}, receive, send))
    assert future.cancelled()
    assert not began


def test_a_picture_that_a_filter_refuses_is_not_shown(tiny_pipe: Pipeline) -> None:
    from onestill.serve.web.server import Settings
    from tests.serve.client import answer_on, serving

    with serving(tiny_pipe, Settings(image_filter=lambda images: [True for _ in images])) as guarded:
        assert guarded.draw().error["code"] == "moderation_blocked"
        assert b"moderation_blocked" in guarded.draw(stream=True).body
        with guarded.live() as socket:
            socket.send('{"id": 1, "prompt": "a"}')
            assert answer_on(socket)[0]["error"]["code"] == "moderation_blocked"
