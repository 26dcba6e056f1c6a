"""Hub ids by the Hub's own client, offline: its cache on this disk, and a server on this machine in the Hub's place."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from onestill.checkpoint import describe, resolve
from onestill.checkpoint.hub import wanted
from onestill.errors import CheckpointError, ModelNotFoundError
from tests.tiny_sd import tiny_sd

REPO, COMMIT = "owner/tiny-turbo", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd21", "sd21")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub client's cache, which it asks its own module for."""
    found = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(found))
    for module in ("huggingface_hub._snapshot_download", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.constants.HF_HUB_CACHE", str(found))
    return found


def fill(cache: Path, folder: Path) -> Path:
    """Lay a model into the cache as the client does: blobs by hash, a snapshot of links, a branch that names it."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_what_is_in_the_cache_is_used_offline(cache: Path, folder: Path) -> None:
    snapshot = fill(cache, folder)
    assert resolve(REPO) == snapshot
    assert resolve(f"{REPO}@{COMMIT}") == snapshot
    assert describe(resolve(REPO)).family == "stable-diffusion"


def test_a_changed_file_in_the_cache_is_found(cache: Path, folder: Path) -> None:
    snapshot = fill(cache, folder)
    blob = (snapshot / "unet" / "diffusion_pytorch_model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"unet.*is not the file"):
        resolve(REPO)


def test_what_is_not_there_offline_is_one_sentence(cache: Path) -> None:
    for name in (REPO, f"{REPO}@{COMMIT}", "stabilityai/sdxl-turbo"):
        with pytest.raises(ModelNotFoundError, match=r"go online, or give a local diffusers folder"):
            resolve(name)


def test_without_the_client_the_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFoundError, match=r"no folder 'owner/tiny-turbo'.*onestill\[hub\]"):
        resolve(REPO)


def test_only_what_is_drawn_with_is_fetched() -> None:
    published = [
        "README.md",
        "model_index.json",
        "sd_xl_turbo_1.0.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer_2/tokenizer_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.onnx",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    ]
    assert wanted(published) == sorted(
        name
        for name in published
        if not name.endswith((".md", ".onnx", ".bin", "1.0.safetensors"))
        and name not in ("text_encoder/model.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors")
    )


def test_a_half_in_one_file_is_not_fetched_with_the_list_of_the_wholes_shards() -> None:
    stem = "unet/diffusion_pytorch_model"
    wholes = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)] + [f"{stem}.safetensors.index.json"]
    assert wanted([*wholes, f"{stem}.fp16.safetensors"]) == [f"{stem}.fp16.safetensors"]
    halves = [f"{stem}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)] + [f"{stem}.safetensors.index.fp16.json"]
    assert wanted([*wholes, *halves]) == sorted(halves)


# --- a download, from this machine ---


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The three kinds of request that a download makes, answered from a folder. Yields the files that were sent."""
    sent: list[str] = []
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    tree = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40} for n in names]
    info: dict[str, Any] = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": n} for n in [*names, "x/model.bin"]]}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{REPO}/tree/"):
                content = json.dumps(tree).encode()
            elif path.startswith(f"/api/models/{REPO}"):
                content = json.dumps(info).encode()
            elif path.startswith(f"/{REPO}/resolve/") and (file := folder / path.split("/", 5)[5]).is_file():
                content = file.read_bytes()
                if with_body:
                    sent.append(path.split("/", 5)[5])
            else:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, format: str, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        here = f"http://127.0.0.1:{served.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", here)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield sent
        served.shutdown()
        thread.join()


def test_a_download_fetches_once_and_is_checked(cache: Path, folder: Path, server: list[str]) -> None:
    found = resolve(REPO)
    assert found.name == COMMIT
    assert describe(found).family == "stable-diffusion"
    assert "unet/diffusion_pytorch_model.safetensors" in server
    assert "x/model.bin" not in server
    assert len(server) == len(set(server))
    assert resolve(REPO) == found
    assert len(server) == len(set(server)), "the second time everything is in the cache"
