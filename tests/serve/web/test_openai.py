"""OpenAI's images API as its clients use it: each row of the table in docs/openai.md."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import Access
from onestill.serve.web.requests import USUAL_SIZES, Bounds, forms_for, job_of
from onestill.serve.web.server import Settings
from tests.serve.client import Answer, Served, serving
from tests.serve.pictures import png

ALIAS = "gpt-image-1"


@pytest.fixture(scope="module")
def served(tiny_pipe: Pipeline) -> Iterator[Served]:
    with serving(tiny_pipe, Settings(aliases=(ALIAS, "dall-e-3"))) as running:
        yield running


def opened(data: str) -> Any:
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), dtype=np.int16)


def file_of(pixels: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def form(served: Served, *parts: tuple[str, bytes | str]) -> Answer:
    """`POST /v1/images/edits` with these parts; bytes are files."""
    body = b""
    for name, value in (("prompt", "a red apple"), *parts):
        file = '; filename="a.png"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        body += f'--XX\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"
    kind = {"content-type": "multipart/form-data; boundary=XX"}
    return served.ask("POST", "/v1/images/edits", body + b"--XX--\r\n", kind)


def events_of(answer: Answer) -> list[tuple[str, Any]]:
    blocks = [block for block in answer.body.decode().split("\n\n") if block.startswith("event: ")]
    return [(block.split("\n")[0][7:], json.loads(block.split("\n")[1][6:])) for block in blocks]


# --- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["auto", "low", "medium", "high", "standard", "hd", "one of tomorrow's"])
def test_fields_without_effect_are_taken_and_said(served: Served, quality: str) -> None:
    answer = served.draw(
        quality=quality, style="vivid", moderation="low", user="u", safety_identifier="s", background="opaque", seed=1
    )
    assert answer.status == 200
    idle = "style, moderation" if quality == "auto" else "quality, style, moderation"
    assert answer.json["notes"] == [f"Without effect here: {idle}."]
    assert answer.json["data"] == served.draw(seed=1).json["data"]
    assert served.draw(user="u", safety_identifier="s", moderation="auto").json["notes"] == []


def test_a_transparent_background_is_refused_in_words(served: Served) -> None:
    error = served.draw(background="transparent").error
    assert "cannot draw a transparent background; send 'opaque'" in error["message"]
    assert error["param"] == "background"


def test_aliases_are_the_model(served: Served) -> None:
    plain = served.draw(model="tiny", seed=1).json["data"]
    assert served.draw(model=ALIAS, seed=1).json["data"] == plain
    assert served.draw(model="dall-e-2").status == 404
    models = served.ask("GET", "/v1/models").json["data"]
    assert [(model["id"], model.get("alias_of")) for model in models] == [
        ("tiny", None),
        (ALIAS, "tiny"),
        ("dall-e-3", "tiny"),
    ]
    assert served.ask("GET", f"/v1/models/{ALIAS}").json["id"] == ALIAS
    assert served.ask("GET", "/v1/models/dall-e-2").status == 404
    assert form(served, ("image", png()), ("model", ALIAS)).status == 200


@pytest.mark.parametrize("size", USUAL_SIZES.split())
def test_usual_sizes_become_what_the_model_draws(served: Served, size: str) -> None:
    answer = served.draw(size=size, seed=1).json
    assert answer["size"] == "32x32"
    assert answer["notes"] == [f"The model does not draw {size}; the picture has 32x32 pixels."]
    assert served.draw(size="auto", seed=1).json["notes"] == served.draw(size="32x32", seed=1).json["notes"] == []
    assert served.draw(size="1000x1000").error["param"] == "size"


def test_a_usual_size_becomes_the_nearest_shape(served: Served) -> None:
    sizes = ((512, 512), (1024, 1024), (768, 1344), (1344, 768))  # (height, width)
    info = dataclasses.replace(served.server.info, sizes=sizes, height=512, width=512)
    kind = forms_for(info, Bounds()).generation
    for asked, drawn in (
        ("1024x1024", (1024, 1024)),
        ("256x256", (512, 512)),
        ("2048x2048", (1024, 1024)),
        ("1536x1024", (768, 1344)),
        ("1024x1792", (1344, 768)),
        ("auto", (512, 512)),
    ):
        job = job_of(kind(prompt="a", size=asked), info)
        assert (job.height, job.width) == drawn, asked


def test_the_longest_prompt_is_cut_with_a_note(served: Served) -> None:
    prompt = "apple " * 5333 + "aa"
    assert len(prompt) == 32_000
    for kind in ("png", "jpeg", "webp"):
        answer = served.draw(prompt=prompt, output_format=kind, seed=1)
        assert answer.status == 200
        assert "is too long: its last" in answer.json["notes"][0]
    assert served.draw(prompt="é" * 32_000, output_format="jpeg").status == 200
    assert served.draw(prompt=prompt + "a").error["param"] == "prompt"
    assert form(served, ("image", png()), ("prompt_", "x")).status == 400
    with served.live() as socket:
        socket.send(json.dumps({"id": 1, "prompt": "a" * 4001}))
        assert json.loads(socket.recv(timeout=60))["error"]["param"] == "prompt"


def test_usage(served: Served) -> None:
    usage = served.draw(n=2, seed=1).json["usage"]
    tokens = usage["input_tokens"]
    assert usage == {
        "input_tokens": tokens,
        "input_tokens_details": {"text_tokens": tokens, "image_tokens": 0},
        "output_tokens": 32,  # two pictures of 4 x 4 latents
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 32},
        "total_tokens": tokens + 32,
    }
    longer = served.draw(prompt="a red apple and a green heart").json["usage"]
    assert tokens < longer["input_tokens"] <= 16  # the tiny model's most
    edit = form(served, ("image", png())).json["usage"]
    assert edit["input_tokens_details"] == {"text_tokens": tokens, "image_tokens": 16}


# --- partial images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "steps", "shown"), [(0, 4, 0), (1, 4, 1), (3, 4, 3), (3, 3, 2), (3, 1, 0)])
def test_partial_images(served: Served, wanted: int, steps: int, shown: int) -> None:
    answer = served.draw(stream=True, partial_images=wanted, num_inference_steps=steps, seed=1)
    events = events_of(answer)
    names = ["image_generation.partial_image"] * shown + ["image_generation.completed"]
    assert [name for name, _ in events] == names
    assert [event["type"] for _, event in events] == names
    assert [event["partial_image_index"] for _, event in events[:-1]] == list(range(shown))
    last = events[-1][1]
    assert (len(last["notes"]) == 1) == (shown < wanted)
    assert last["usage"]["output_tokens"] == 16
    pictures = [opened(event["b64_json"]) for _, event in events]
    assert all((one != other).any() for one, other in itertools.pairwise(pictures))
    whole = served.draw(num_inference_steps=steps, seed=1).json["data"][0]
    np.testing.assert_array_equal(pictures[-1], opened(whole["b64_json"]))


def test_partial_images_of_several_pictures_and_of_edits(served: Served) -> None:
    events = events_of(served.draw(n=3, stream=True, partial_images=1, num_inference_steps=2, seed=1))
    for seed in (1, 2, 3):
        own = [name for name, event in events if event["seed"] == seed]
        assert own == ["image_generation.partial_image", "image_generation.completed"]
    answer = form(
        served,
        ("image", png()),
        ("stream", "true"),
        ("partial_images", "2"),
        ("strength", "1"),
        ("num_inference_steps", "3"),
    )
    assert [name for name, _ in events_of(answer)] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


def test_partial_images_need_a_stream(served: Served) -> None:
    assert served.draw(partial_images=2).json["notes"] == ["Partial images come only with stream."]
    assert served.draw(partial_images=4, stream=True).status == 400


# --- masks and several images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture() -> Any:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3))


def mask_of(draws: Any) -> bytes:
    """A mask as OpenAI's: transparent where to draw."""
    pixels = np.zeros((*draws.shape, 4))
    pixels[..., 3] = 255 * ~draws
    return file_of(pixels)


@pytest.fixture(scope="module")
def left() -> Any:
    draws = np.zeros((32, 32), bool)
    draws[:, :16] = True
    return draws


def test_a_mask_keeps_the_rest(served: Served, tiny_pipe: Pipeline, picture: Any, left: Any) -> None:
    for steps in (1, 3):
        answer = form(
            served,
            ("image", file_of(picture)),
            ("mask", mask_of(left)),
            ("num_inference_steps", str(steps)),
            ("seed", "5"),
        )
        assert (answer.status, answer.json["notes"]) == (200, [])
        found = opened(answer.json["data"][0]["b64_json"])
        np.testing.assert_array_equal(found[:, 16:], picture[:, 16:])
        mask = (255 * left).astype(np.uint8)
        expected = tiny_pipe(
            "a red apple", image=picture.astype(np.uint8), mask=mask, strength=1.0, seed=5, num_inference_steps=steps
        )
        np.testing.assert_array_equal(found, np.asarray(expected.images[0], dtype=np.int16))


def test_a_full_and_an_empty_mask(served: Served, picture: Any) -> None:
    image = ("image", file_of(picture))
    parts = (image, ("strength", "0.5"), ("seed", "1"))
    whole = form(served, *parts).json["data"]
    assert form(served, *parts, ("mask", mask_of(np.ones((32, 32), bool)))).json["data"][0]["seed"] == 1
    full = form(served, *parts, ("mask", mask_of(np.ones((32, 32), bool)))).json["data"]
    np.testing.assert_array_equal(opened(full[0]["b64_json"]), opened(whole[0]["b64_json"]))
    empty = form(served, *parts, ("mask", mask_of(np.zeros((32, 32), bool)))).json
    np.testing.assert_array_equal(opened(empty["data"][0]["b64_json"]), picture)
    assert "The mask keeps the whole image" in empty["notes"][-1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (b"no picture", "The mask cannot be read"),
        (file_of(np.zeros((16, 32))), "The mask has another size than the image"),
        (png((4000, 20)), "The mask has too many pixels"),
        ("text", "Send the mask as one file"),
    ],
)
def test_a_mask_that_cannot_be_used(served: Served, picture: Any, mask: bytes | str, message: str) -> None:
    answer = form(served, ("image", file_of(picture)), ("mask", mask))
    assert (answer.status, answer.error["param"]) == (400, "mask")
    assert message in answer.error["message"]


def test_of_several_images_the_first_is_used(served: Served, picture: Any) -> None:
    images = [("image[]", file_of(picture)), *[("image[]", png())] * 15]
    answer = form(served, *images, ("seed", "1"))
    assert answer.json["notes"][0] == "Of 16 images the first was used; this model starts from one."
    assert answer.json["data"] == form(served, images[0], ("seed", "1")).json["data"]
    assert form(served, *images, images[0]).error["param"] in ("image", None)
    assert form(served, ("mask", png())).error["param"] == "image"


def test_input_fidelity_is_said_to_do_nothing(served: Served) -> None:
    answer = form(served, ("image", png()), ("input_fidelity", "high"))
    assert answer.json["notes"][0] == "Without effect here: input_fidelity."


# --- limits ---------------------------------------------------------------------------------------------------------


def test_rate_limits_are_in_the_headers(tiny_pipe: Pipeline, tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'serve.db'}")
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=5)) as served:
        for answer, left in ((served.draw(n=2), "3"), (served.draw(stream=True), "3"), (served.draw(n=3), "2")):
            assert answer.headers["x-ratelimit-limit-requests"] == "5"
            assert answer.headers["x-ratelimit-remaining-requests"] == left
            hours, rest = answer.headers["x-ratelimit-reset-requests"].split("h")
            assert 0 <= int(hours) <= 24
            assert rest.endswith("s")
        assert (answer.status, answer.error["code"]) == (429, "insufficient_quota")


def test_without_a_quota_there_are_no_rate_limits(served: Served) -> None:
    assert not [name for name in served.draw().headers if name.startswith("x-ratelimit")]


def test_uploads_up_to_the_configured_size(tiny_pipe: Pipeline) -> None:
    filled = png() + b"\0" * (13 * 2**20)
    with serving(tiny_pipe, Settings(bounds=Bounds(body=50 * 2**20))) as served:
        assert served.edit(filled, seed="1").status == 200
    with serving(tiny_pipe) as served:
        assert served.edit(filled, seed="1").status == 413
