from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from onestill.pipeline.picture import fitted
from onestill.serve.uploads.decoder import Decoder
from onestill.serve.web.requests import job_of
from tests.serve.client import Served
from tests.serve.pictures import bomb, gif, png


async def read_upload(data: bytes, *size_and_bound: int) -> PIL.Image.Image:
    decoder = Decoder(1)
    try:
        return await decoder.read("someone", data, *size_and_bound)
    finally:
        decoder.close()


def opened(data: str) -> Any:
    return PIL.Image.open(io.BytesIO(base64.b64decode(data)))


def test_an_upload_is_fitted_before_it_waits(served: Served) -> None:
    """A turned and transparent one as the pipeline would do it, and the pipeline changes nothing more."""
    server = served.server
    ramp = np.add.outer(np.arange(300), np.arange(500)).astype(np.uint8)
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    PIL.Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp, ramp], 2), "RGBA").save(file, "PNG", exif=exif)
    for size in (None, "auto", "32x32"):
        job = job_of(server.forms.live(id=1, prompt="a", size=size), server.info)
        image = asyncio.run(read_upload(file.getvalue(), job.height, job.width, 150_000))
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
    ({"prompt": "a" * 32_001}, "prompt"),
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
