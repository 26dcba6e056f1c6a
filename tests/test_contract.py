"""The inventory: every name that others build on, as literals, compared with what the code has.

A name leaves or enters this file only with a line in the changelog. What the names do is tested elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import typer.main
from fastapi import FastAPI
from safetensors import safe_open

import onestill
from onestill.cli.app import make_app
from onestill.data import sample_shards
from onestill.engine import ENGINES
from onestill.evaluate import FeatureStatistics
from onestill.pipeline import Pipeline, load
from onestill.sampling import SAMPLERS
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import Access
from onestill.serve.gallery.store import Gallery, Rules
from onestill.serve.metrics import HELP
from onestill.serve.web.app import create_app
from onestill.serve.web.server import Server, Settings
from onestill.train.recipe import COMPILED, METHODS, DataOptions, LoopOptions
from tests.serve.client import answer_on, serving

PUBLIC_NAMES = """
    CheckpointError DataError ImageError MissingExtraError ModelInfo ModelNotFoundError NotEnoughMemoryError
    NotFiniteError OnestillError Output OutputError Pipeline PromptError RecipeError ScheduleError SizeError StepsError
    Timings UnsafeFormatError __version__ list_models load model_path
"""

# Every command with its arguments and options: `/` joins two spellings, `=` gives a default, `...` follows what may be
# repeated, `!` an option that must be given.
COMMANDS = {
    "onestill": "--version --install-completion --show-completion",
    "onestill generate": """PROMPT... --model/-m=icons --engine --device --dtype --steps --seed/-s --num=1 --size
        --guidance-scale --negative-prompt --sampler --image --mask --strength --out/-o --force --unet --lora...
        --tiny-vae --preset --schedule --embedding... --compile --quantize --json""",
    "onestill serve": """--model/-m=icons --engine --device --dtype --threads --host=127.0.0.1 --port/-p=8000 --database
        --keys --trial-limit --allow-host... --allow-origin... --trust-proxy --gallery --gallery-days=30
        --gallery-most=1000 --queue=64 --batch=4 --blocked-words --image-filter --no-filter --sign-with --sign-key
        --ray=0 --ray-gpus=0.0 --timeout --no-restart --unet --lora... --tiny-vae --preset --schedule --embedding...
        --compile --quantize --model-alias... --upload-mb=12 --metrics-for-all""",
    "onestill verify": "FILE --json",
    "onestill train": "RECIPE.toml --set... --resume --dry-run --devices=0",
    "onestill evaluate": """--reference...! --network! --out/-o! --model/-m... --steps... --guidance-scale
        --text-model=icons --number=2000 --seed=0 --engine --device --dtype --json""",
    "onestill bench": """--model/-m=icons --random --engine --device --dtype --tiny-vae --compile --quantize --threads
        --steps --size --batch... --pictures=20 --warm-up=3 --seed=1 --compare --plot --json""",
    "onestill export": """--out/-o! --model/-m=icons --to=openvino --weights --int8 --unet --lora... --tiny-vae
        --preset --schedule --embedding...""",
    "onestill models": "NAME|PATH|ID --preset --check --json",
    "onestill doctor": "--model/-m=icons --draw/--no-draw --deep --json",
    "onestill keys": "",
    "onestill keys new": "NAME --limit --database --keys",
    "onestill keys list": "--database --json",
    "onestill keys revoke": "ID --database",
    "onestill gallery": "",
    "onestill gallery list": "--database --json",
    "onestill gallery remove": "ID... --database",
    "onestill data": "",
    "onestill data count": "SHARD|FOLDER... --json",
    "onestill data sheet": "--out/-o! SHARD|FOLDER... --number=48 --seed=0 --force",
    "onestill data pack": "FOLDER --out/-o! --size=512 --per-shard=1000",
    "onestill data fetch": "URL... --out/-o! --sha256",
    "onestill data cache": "--model/-m! --out/-o! SHARD|FOLDER... --device --batch-size=8 --part=0/1",
}

ROUTES = {
    "/v1/images/generations": "post",
    "/v1/images/edits": "post",
    "/v1/gallery": "get post",
    "/v1/gallery/{name}": "delete get",
    "/v1/gallery/{name}/file": "get",
    "/v1/models": "get",
    "/v1/models/{name}": "get",
    "/healthz": "get",
    "/readyz": "get",
    "/metrics": "get",
}
ROUTES_WITHOUT_SCHEMA = "/ /openapi.json /v1/realtime /web/{name}"
FIELDS = """
    background input_fidelity image mask model moderation n num_inference_steps output_compression output_format
    partial_images prompt quality response_format safety_identifier seed size strength
    stream style user
"""
ONLY_IN_EDITS = "image mask input_fidelity strength"
READY_KEYS = "type model limits"
IMAGE_KEYS = "type id seed width height format timings"
METRICS = """
    onestill_http_request_seconds onestill_http_requests_total onestill_live_answers_total onestill_loop_lag_seconds
    onestill_pictures_total onestill_stage_seconds
"""

METHOD_NAMES = ("autoencoder", "contrastive", "diffusion", "add", "ladd", "lcm", "decoder")
COMPILED_METHODS = ("diffusion", "add", "ladd", "lcm", "decoder")
DATA_KEYS = "shards images seed prefetch workers"
LOOP_KEYS = """
    iterations batch_size seed accumulate parallel device precision compile threads log_every sheet_every
    checkpoint_every keep_checkpoints ema_decay warmup decay grad_clip max_bad_steps
"""
SAMPLER_NAMES = "consistency ddim dpmpp_2m euler euler_ancestral"
ENGINE_NAMES = ("openvino", "torch")

MANIFEST_KEYS = "files format guidance_scale licence made name num_inference_steps onestill styles version"
OPENVINO_INDEX_KEYS = "format openvino parts"
OPENVINO_PARTS = "text_encoder time unet decoder encoder"
INT8_KEYS = "alone_psnr_db format parts pictures psnr_db"
PICTURE_KEYS = """
    prompt seed num_inference_steps sampler guidance_scale size model engine version parameters
"""
SHARD_SUFFIXES = "json txt webp"  # of the sample set; a picture may be PNG or JPEG, and arrays end in .npy
STATISTICS_KEYS = "count mean scatter"


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> Pipeline:
    return load(tiny_folder, threads=1)


@pytest.fixture(scope="module")
def app(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('database')}/all.db")
    server = Server(pipe, Settings(), Access({}, ledger, None), Gallery(ledger, Rules()))
    yield create_app(server)
    server.close()


def test_public_names() -> None:
    assert set(onestill.__all__) == set(PUBLIC_NAMES.split())


def declared(parameter: Any) -> str:
    """One argument or option of a command, written as in `COMMANDS`."""
    if parameter.param_type_name == "argument":
        name, repeats = str(parameter.metavar), parameter.nargs == -1
        return name + "..." * (repeats and not name.endswith("..."))
    text = "/".join([*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    if default is not None and not isinstance(default, bool) and default != ():
        text += f"={default}"
    return text + "..." * parameter.multiple + "!" * parameter.required


def declared_in(command: Any, name: str) -> Iterator[tuple[str, list[str]]]:
    """Every command below this one, and what each declares."""
    yield name, [declared(parameter) for parameter in command.params]
    for inner, subcommand in getattr(command, "commands", {}).items():
        yield from declared_in(subcommand, f"{name} {inner}")


def test_commands_and_their_options() -> None:
    found = dict(declared_in(typer.main.get_command(make_app()), "onestill"))
    assert {name: sorted(words) for name, words in found.items()} == {
        name: sorted(words.split()) for name, words in COMMANDS.items()
    }


def test_routes_and_their_methods(app: FastAPI) -> None:
    schema = app.openapi()
    assert {path: " ".join(sorted(operations)) for path, operations in schema["paths"].items()} == ROUTES
    named = {path for route in app.routes if (path := getattr(route, "path", None))}
    assert named - set(ROUTES) == set(ROUTES_WITHOUT_SCHEMA.split())
    for path, kind, fewer in (
        ("/v1/images/generations", "application/json", ONLY_IN_EDITS.split()),
        ("/v1/images/edits", "multipart/form-data", []),
    ):
        body = schema["paths"][path]["post"]["requestBody"]["content"][kind]["schema"]
        assert set(body["properties"]) == set(FIELDS.split()) - set(fewer)


def test_realtime_messages(pipe: Pipeline) -> None:
    with serving(pipe) as served, served.live(ready=False) as socket:
        assert set(json.loads(socket.recv(timeout=60))) == set(READY_KEYS.split())
        socket.send(json.dumps({"id": 7, "prompt": "a red apple", "seed": 1}))
        header, _ = answer_on(socket)
    assert set(header) == set(IMAGE_KEYS.split())


def test_metrics() -> None:
    assert set(HELP) == set(METRICS.split())


def test_recipes() -> None:
    assert METHODS == METHOD_NAMES
    assert COMPILED == COMPILED_METHODS
    assert [field.name for field in dataclasses.fields(DataOptions)] == DATA_KEYS.split()
    assert [field.name for field in dataclasses.fields(LoopOptions)] == LOOP_KEYS.split()


def test_engines_and_samplers() -> None:
    assert ENGINES == ENGINE_NAMES
    assert set(SAMPLERS) == set(SAMPLER_NAMES.split())


def test_files_of_a_model() -> None:
    folder = onestill.model_path("icons")
    manifest = json.loads((folder / "onestill.json").read_text())
    assert (manifest["format"], set(manifest)) == (1, set(MANIFEST_KEYS.split()))
    assert set(manifest["files"]["NOTICE"]) == {"size", "sha256"}
    index = json.loads((folder / "openvino" / "index.json").read_text())
    assert (index["format"], set(index)) == (2, set(OPENVINO_INDEX_KEYS.split()))
    assert list(index["parts"]) == OPENVINO_PARTS.split()
    assert set(index["parts"]["unet"]) == {"weights", "size", "sha256"}
    int8 = json.loads((folder / "openvino" / "int8.json").read_text())
    assert (int8["format"], set(int8)) == (1, set(INT8_KEYS.split()))


def test_parameters_in_a_picture(pipe: Pipeline, tmp_path: Path) -> None:
    pipe("a red apple", seed=1).save(0, tmp_path / "a.png")
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert list(picture.text) == PICTURE_KEYS.split()  # type: ignore[attr-defined]


def test_files_of_data_and_evaluation(tmp_path: Path) -> None:
    with tarfile.open(sample_shards()[0]) as shard:
        assert {name.partition(".")[2] for name in shard.getnames()} == set(SHARD_SUFFIXES.split())
    statistics = FeatureStatistics(2)
    statistics.update([[0.0, 1.0], [2.0, 1.0]])
    statistics.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "onestill.feature_statistics", "version": "1"}
        assert set(file.keys()) == set(STATISTICS_KEYS.split())
