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
from tests.serve.client import Served, serving
from tests.serve.pictures import png

PATHS = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])

openai = pytest.importorskip("openai")


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
    assert opened(events[0].b64_json).size == (32, 32)
    events = list(client.images.edit(image=io.BytesIO(png()), prompt="a", stream=True))
    assert [event.type for event in events] == ["image_edit.completed"]


def test_its_errors_are_its_own(client: Any, served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.generate(prompt="a", n=11)
    assert (wrong.value.param, wrong.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a", model="dall-e-3")


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
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
