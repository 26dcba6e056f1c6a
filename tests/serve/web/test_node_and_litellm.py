"""OpenAI's SDK for Node and LiteLLM, where they are installed; `.ci/run` installs the first where there is npm.

npm install --prefix FOLDER openai && NODE_PATH=FOLDER/node_modules pytest tests/serve/web/test_node_and_litellm.py
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from onestill.pipeline import Pipeline
from onestill.serve.web.server import Settings
from tests.serve.client import Served, serving

SCRIPT = """
const OpenAI = require("openai").default;
const { toFile } = require("openai");
const fs = require("fs");
const [url, picture, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "unused", maxRetries: 0 });

async function main() {
  const found = {};
  found.models = [];
  for await (const model of await client.models.list()) found.models.push(model.id);
  found.generated = await client.images.generate({
    model: "gpt-image-1", prompt: "a red apple", n: 2, size: "1024x1024", quality: "high", background: "opaque",
    moderation: "auto", output_format: "webp", output_compression: 70, user: "someone", seed: 4,
  });
  found.events = [];
  const stream = await client.images.generate({
    model: "gpt-image-1", prompt: "a red apple", stream: true, partial_images: 2, num_inference_steps: 3,
  });
  for await (const event of stream) found.events.push(event.type);
  const file = (path, name) => toFile(fs.createReadStream(path), name, { type: "image/png" });
  found.edited = await client.images.edit({
    model: "gpt-image-1", prompt: "a red apple", mask: await file(mask, "mask.png"),
    image: [await file(picture, "a.png"), await file(picture, "b.png")], input_fidelity: "high",
  });
  found.errors = [];
  for (const wrong of [{ n: 11 }, { background: "transparent" }, { model: "dall-e-2" }]) {
    try {
      await client.images.generate({ prompt: "a", ...wrong });
    } catch (error) {
      found.errors.push([error.constructor.name, error.status, error.code, error.param]);
    }
  }
  console.log(JSON.stringify(found));
}
main().catch((error) => { console.error(error); process.exit(1); });
"""


@pytest.fixture(scope="module")
def served(tiny_pipe: Pipeline) -> Iterator[Served]:
    with serving(tiny_pipe, Settings(aliases=("gpt-image-1",))) as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """An orange picture, and a mask that is transparent in its left half."""
    PIL.Image.new("RGB", (32, 32), "orange").save(tmp_path / "a.png")
    mask = PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "a.png", tmp_path / "mask.png"


def opened(data: str) -> Any:
    return PIL.Image.open(io.BytesIO(base64.b64decode(data)))


def test_node(served: Served, files: tuple[Path, Path], tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or subprocess.run([node, "-e", 'require("openai")'], capture_output=True).returncode:
        pytest.skip("Node or its package openai is not installed; see the module.")
    script = tmp_path / "client.cjs"
    script.write_text(SCRIPT)
    run = subprocess.run([node, script, served.url, *files], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["models"] == ["tiny", "gpt-image-1"]
    generated = found["generated"]
    assert [one["seed"] for one in generated["data"]] == [4, 5]
    assert opened(generated["data"][0]["b64_json"]).format == "WEBP"
    assert generated["usage"]["output_tokens"] == 32
    assert found["events"] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert opened(found["edited"]["data"][0]["b64_json"]).getpixel((24, 8)) == (255, 165, 0)
    assert len(found["edited"]["notes"]) == 2
    assert found["errors"] == [
        ["BadRequestError", 400, "invalid_value", "n"],
        ["BadRequestError", 400, "invalid_value", "background"],
        ["NotFoundError", 404, "model_not_found", None],
    ]


@pytest.mark.filterwarnings("ignore")  # of its own imports and models
def test_litellm(served: Served, files: tuple[Path, Path]) -> None:
    litellm = pytest.importorskip("litellm")
    at: dict[str, Any] = {"api_base": f"{served.url}/v1", "api_key": "unused", "model": "openai/gpt-image-1"}
    answer = litellm.image_generation(
        prompt="a red apple", n=2, size="1024x1024", quality="high", user="someone", extra_body={"seed": 4}, **at
    )
    assert [opened(one.b64_json).size for one in answer.data] == [(32, 32)] * 2
    assert answer.usage.output_tokens == 32
    picture, mask = files
    with picture.open("rb") as image, mask.open("rb") as area:
        edited = litellm.image_edit(prompt="a red apple", image=[image], mask=area, **at)
    assert opened(edited.data[0].b64_json).getpixel((24, 8)) == (255, 165, 0)
    with pytest.raises(litellm.BadRequestError, match="less than or equal to 10"):
        litellm.image_generation(prompt="a", n=11, **at)
