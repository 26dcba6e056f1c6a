"""Clients that others wrote: the official one of OpenAI's API, and a fuzzer of OpenAPI schemas."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import Access
from onestill.serve.gallery.store import Gallery, Rules
from onestill.serve.web.server import Settings
from tests.serve.client import Served, serving
from tests.serve.pictures import png

PATHS = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def served(tiny_pipe: Pipeline) -> Iterator[Served]:
    with serving(tiny_pipe, Settings(aliases=("gpt-image-1",))) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


def opened(data: str) -> Any:
    return PIL.Image.open(io.BytesIO(base64.b64decode(data)))


def test_generate(client: Any) -> None:
    answer = client.images.generate(
        model="tiny",
        prompt="a red apple",
        n=2,
        size="32x32",
        quality="auto",
        user="someone",
        output_format="webp",
        extra_body={"seed": 4, "num_inference_steps": 2},
    )
    assert len(answer.data) == 2
    assert opened(answer.data[0].b64_json).format == "WEBP"
    assert (answer.size, answer.output_format) == ("32x32", "webp")
    assert answer.data[1].seed == 5


def test_edit(client: Any) -> None:
    for image in (io.BytesIO(png()), [("a.png", png(), "image/png")], ("a.png", png(), "image/png")):
        answer = client.images.edit(image=image, prompt="a red apple", extra_body={"strength": 0.3, "seed": 1})
        assert opened(answer.data[0].b64_json).size == (32, 32)


def test_stream(client: Any) -> None:
    events = list(client.images.generate(prompt="a red apple", n=2, stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert "none shown" in events[0].notes[0]
    assert opened(events[0].b64_json).size == (32, 32)
    events = list(client.images.edit(image=io.BytesIO(png()), prompt="a", stream=True))
    assert [event.type for event in events] == ["image_edit.completed"]


def test_partial_images(client: Any) -> None:
    events = list(
        client.images.generate(
            prompt="a red apple", stream=True, partial_images=2, extra_body={"num_inference_steps": 3, "seed": 1}
        )
    )
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert events[2].usage.total_tokens == events[2].usage.input_tokens + 16


def test_everything_that_its_types_know(client: Any) -> None:
    """Of gpt-image and dall-e, with what has no effect here; the answer's fields are its own."""
    answer = client.images.generate(
        model="gpt-image-1",
        prompt="a red apple",
        background="opaque",
        moderation="low",
        n=1,
        output_compression=80,
        output_format="jpeg",
        quality="high",
        response_format="b64_json",
        size="1536x1024",
        style="natural",
        user="someone",
        extra_body={"safety_identifier": "someone"},
    )
    assert (answer.size, answer.output_format, answer.background) == ("32x32", "jpeg", "opaque")
    assert answer.usage.input_tokens_details.text_tokens == answer.usage.input_tokens
    assert len(answer.notes) == 2
    mask = PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 32))
    file = io.BytesIO()
    mask.save(file, "PNG")
    image = PIL.Image.new("RGB", (32, 32), "orange")
    original = io.BytesIO()
    image.save(original, "PNG")
    edited = client.images.edit(
        model="gpt-image-1",
        image=[("a.png", original.getvalue(), "image/png"), ("b.png", png(), "image/png")],
        mask=("mask.png", file.getvalue(), "image/png"),
        prompt="a red apple",
        background="auto",
        input_fidelity="high",
        n=1,
        quality="low",
        size="1024x1024",
    )
    found = opened(edited.data[0].b64_json)
    assert found.getpixel((24, 8)) == (255, 165, 0)
    assert found.crop((0, 0, 16, 32)).getcolors() != [(512, (255, 165, 0))]
    assert len(edited.notes) == 3
    with pytest.raises(openai.BadRequestError, match="transparent background"):
        client.images.generate(prompt="a", background="transparent")


def test_its_limits_are_in_the_headers(tiny_pipe: Pipeline, tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'serve.db'}")
    with (
        serving(tiny_pipe, access=Access(ledger=ledger, trial=5)) as limited,
        openai.OpenAI(base_url=f"{limited.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        with pytest.raises(openai.AuthenticationError):
            client.images.generate(prompt="a")
        answer = client.images.with_raw_response.generate(prompt="a", extra_headers={"Authorization": openai.Omit()})
        assert answer.headers["x-ratelimit-remaining-requests"] == "4"


def test_its_errors_are_its_own(client: Any, served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.generate(prompt="a", n=11)
    assert (wrong.value.param, wrong.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a", model="dall-e-3")


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "gpt-image-1"]
    assert client.models.retrieve("tiny").owned_by == "onestill"


def schemathesis(served: Served, folder: Path, *more: str) -> None:
    pytest.importorskip("schemathesis")
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
            *("--checks", "all", "--max-examples", "15", "--phases", "examples,coverage,fuzzing"),
            *("--seed", "1", "--workers", "1", "--no-color", *more),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "tests.serve.schemathesis_hooks", "PYTHONPATH": PATHS},
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"[1-9]\d* (generated|passed)", run.stdout), run.stdout[-2000:]


@pytest.mark.slow
def test_schemathesis_finds_nothing(served: Served, tmp_path: Path) -> None:
    schemathesis(served, tmp_path)


@pytest.mark.slow
def test_schemathesis_finds_nothing_in_the_gallery(tiny_pipe: Pipeline, tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'serve.db'}")
    key = ledger.add_key("schemathesis", None)[1]
    gallery = Gallery(ledger, Rules(each=10_000, saves_a_minute=60_000, looks_a_second=1000))
    with serving(tiny_pipe, access=Access(ledger=ledger), gallery=gallery) as served:
        schemathesis(served, tmp_path, "--include-path-regex", "gallery", "--header", f"Authorization: Bearer {key}")
        assert gallery.page(1)
