from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from onestill.pipeline import Pipeline
from onestill.serve.queue.jobs import Picture
from onestill.serve.web.images import _Events
from tests.serve.client import Served
from tests.serve.pictures import png


def opened(data: str) -> Any:
    return PIL.Image.open(io.BytesIO(base64.b64decode(data)))


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
