"""Damaged files of every kind that is read, made from whole ones by a seed: each is read, or refused in one sentence.

python -m tests.fuzz [--seconds 600] [--seed 0] [TARGET...]
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from onestill.errors import OnestillError

ROOT = Path(__file__).parents[1]
ODD: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, -(2**63), 0.5, 1e308, -1e-308, float("nan"),
                  float("inf"), "", " ", "x" * 300, "\ud800", "\0", "../..", "~", "nan", [], [[]], [None], [0, 0], {},
                  {"": None}, {"a": {"b": [1]}}]  # fmt: skip
SLOW_S = 20.0  # which no file of a few kilobytes may take


@dataclass(frozen=True)
class Target:
    """Files, and what reads them. `count` of damaged ones take a second or so."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[Path], object]
    count: int = 60


def damaged(rng: random.Random, path: Path, content: bytes) -> bytes:
    """One file's content, changed at a few places or in its structure."""
    text = path.suffix in (".json", ".toml", ".jsonl")
    if text and rng.random() < 0.6:
        try:
            value = tomllib.loads(content.decode()) if path.suffix == ".toml" else json.loads(content)
        except ValueError:
            return _bytes_damaged(rng, content)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            value = _changed(rng, value)
        if path.suffix == ".toml":
            return _toml(value if isinstance(value, dict) else {"": value}).encode(errors="surrogatepass")
        return json.dumps(value).encode(errors="surrogatepass")
    if path.suffix == ".safetensors" and rng.random() < 0.6:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        for _ in range(rng.choice([1, 1, 2])):
            header = _changed(rng, header)
        made = json.dumps(header).encode(errors="surrogatepass")
        return len(made).to_bytes(8, "little") + made + content[8 + size :]
    return _bytes_damaged(rng, content)


def _bytes_damaged(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8, 30])):
        # Most of what is read first says what follows: there damage does most.
        most = len(data) if rng.random() < 0.5 else min(len(data), 600)
        at, size = rng.randrange(most + 1), rng.choice([1, 1, 2, 4, 4, 8, 40, 512])
        how = rng.randrange(8)
        if how == 0:
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        elif how == 1:
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif how == 2:
            data[at : at + size] = b"\xff" * len(data[at : at + size])
        elif how == 3:
            del data[at : at + size]
        elif how == 4:
            data[at:at] = data[at : at + size] * rng.choice([1, 1, 100])
        elif how == 5:
            data[at:at] = rng.choice([b"\xef\xbb\xbf", b"\0", b"\r\n", b'"', b"{", b"]", b"-1", b"9" * 30, b"\xff\xfe"])
        elif how == 6 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        else:
            del data[at:]
    return bytes(data)


def _changed(rng: random.Random, value: Any) -> Any:
    """A value of JSON or TOML with one of its parts replaced, left out, or put in twice."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        changed: Any = dict(value) if isinstance(value, dict) else list(value)
        how = rng.random()
        if how < 0.15:
            del changed[key]
        elif how < 0.25 and isinstance(changed, list):
            changed.append(changed[key])
        elif how < 0.25:
            changed[f"{key}{rng.choice(['', '_', '.x', '2'])}"] = changed[key]
        else:
            changed[key] = _changed(rng, changed[key])
        return changed
    return rng.choice(ODD)


def _toml(value: Any, name: str = "") -> str:
    """Just enough TOML: tables of values."""
    lines = [f"{json.dumps(key)} = {_toml_value(one)}" for key, one in value.items() if not isinstance(one, dict)]
    tables = [(f"{name}.{json.dumps(key)}" if name else json.dumps(key), one) for key, one in value.items()
              if isinstance(one, dict)]  # fmt: skip
    return "\n".join([*lines, *(f"[{at}]\n{_toml(one, at)}" for at, one in tables)])


def _toml_value(value: Any) -> str:
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) < 1e300 else "nan"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return '"none"' if value is None else json.dumps(value) if not isinstance(value, dict) else "{}"


# --- what is read ---------------------------------------------------------------------------------------------------


def targets(scratch: Path) -> Iterator[Target]:
    """Every kind of file, whole, in a folder that may be written into."""
    yield Target("pictures", tuple(_pictures(scratch / "pictures")), _read_picture, 150)
    yield Target("shards", tuple(_shards(scratch / "shards")), _read_shard, 60)
    yield from _texts(scratch / "texts")
    yield from _models(scratch / "models")
    yield Target("recipes", tuple(_recipes(scratch / "recipes")), _read_recipe, 120)
    yield from _trained(scratch / "trained")


def _pictures(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a red star"
    exif[0x011A] = 72.5
    ramp = np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3)
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "a.jpg": (Image.fromarray(ramp), {"exif": exif}),
        "b.jpg": (Image.fromarray(ramp).convert("CMYK"), {"progressive": True}),
        "a.png": (Image.fromarray(ramp), {"exif": exif, "dpi": (72, 72)}),
        "b.png": (Image.fromarray(ramp).convert("P"), {"transparency": 3}),
        "c.png": (Image.fromarray(ramp[..., 0].astype(np.uint16) * 257), {}),
        "a.webp": (Image.fromarray(ramp), {"exif": exif}),
        "b.webp": (Image.fromarray(ramp).convert("RGBA"), {"lossless": True}),
        "a.tif": (Image.fromarray(ramp), {"compression": "tiff_lzw"}),
        "b.tif": (Image.fromarray(ramp[..., 0].astype(np.float32) / 255), {}),
        "c.tif": (Image.fromarray(ramp[..., 0].astype(np.int32) * 99), {}),
        "a.gif": (Image.fromarray(ramp), {"save_all": True, "append_images": [Image.fromarray(ramp[::-1])]}),
        "a.bmp": (Image.fromarray(ramp), {}),
        "a.ico": (Image.fromarray(ramp), {}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
        yield folder / name


def _read_picture(path: Path) -> None:
    from onestill.cli.commands.generate import read_image
    from onestill.pipeline.picture import fitted
    from onestill.serve.provenance import read_provenance

    for read in (read_image, read_provenance, lambda one: fitted(Image.open(one), 32, 32) if _opens(one) else None):
        try:
            read(path)
        except OnestillError as error:
            check_sentence(error)


def _opens(path: Path) -> bool:
    try:
        Image.open(path).close()
    except Exception:
        return False
    return True


def _shards(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)

    def encoded(kind: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, kind)
        return file.getvalue()

    def npy(array: Any) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(folder / f"{form}.tar", "w", format=form) as tar:
            for i, (kind, suffix) in enumerate((("WEBP", "webp"), ("JPEG", "jpg"), ("PNG", "png"))):
                key = f"train/{i:04d}" if i else "train/" + "long" * 40 * (form != tarfile.USTAR_FORMAT) + "0"
                for ending, data in (
                    (suffix, encoded(kind)),
                    ("txt", b"a red star"),
                    ("json", b'{"original_size": [8, 8], "crop": [0, 0]}'),
                    ("latents.npy", npy(np.zeros((4, 2, 2), np.float16))),
                ):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        yield folder / f"{form}.tar"


def _read_shard(path: Path) -> None:
    from onestill.data import ShardReader

    for images in (True, False):
        reader = ShardReader(path, shuffle=False, epochs=1, images=images)
        try:
            found = list(reader)
        finally:
            reader.close()
        assert len(found) + len(reader.skipped) >= len(reader)
        assert all(why and "\n" not in why for why in reader.skipped.values()), reader.skipped


def _texts(folder: Path) -> Iterator[Target]:
    from onestill.data.pack import pack
    from onestill.data.remote import read_hashes
    from onestill.serve.access.keys import read_keys

    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a red star"}\n')
    (folder / "table").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "table/a.png")
    (folder / "table/metadata.csv").write_text('file_name,text\na.png,"a, red\nstar"\n')
    digest = "ab" * 32
    (folder / "sums.txt").write_text(f"{digest}  a.tar\n{digest} *b.tar\n")
    (folder / "keys.txt").write_text(f"# ours\nalice {digest} 50\nbob {digest}\n")
    yield Target("tables", (folder / "metadata.jsonl",), lambda path: list(pack(path.parent, 32, {})), 60)
    yield Target("csv", (folder / "table/metadata.csv",), lambda path: list(pack(path.parent, 32, {})), 60)
    yield Target("sums", (folder / "sums.txt",), read_hashes, 60)
    yield Target("keys", (folder / "keys.txt",), read_keys, 60)


def _models(folder: Path) -> Iterator[Target]:
    from tests.lora_files import lora_pairs, write_lora
    from tests.tiny import tiny_model
    from tests.tiny_sd import single_file, tiny_pipeline, tiny_sd

    folder.mkdir(parents=True)
    own = tiny_model(folder / "own")
    yield Target("model", tuple(_small_files(own)), lambda path: _read_model(own), 120)
    yield Target("loading", tuple(sorted(own.rglob("openvino/*"))), lambda path: _load_model(own), 25)
    for family in ("sd15", "sdxl"):
        sd = tiny_sd(folder / family, family)
        yield Target(family, tuple(_small_files(sd)), lambda path, sd=sd: _read_model(sd), 20)
        file = single_file(sd, folder / f"{family}.safetensors", family, notes={"modelspec.resolution": "64x64"})
        yield Target(f"{family}-file", (file,), _read_single_file, 25)
    pipeline = tiny_pipeline("sd15")
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    loras = tuple(
        write_lora(folder / f"{naming}.safetensors", lora_pairs(parts), naming) for naming in ("peft", "kohya")
    )
    yield Target("loras", loras, lambda path: _read_lora(path, pipeline, folder / "sd15"), 30)


def _small_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".txt", ".gz", ".safetensors") and path.stat().st_size < 2**21:
            yield path


def _read_model(folder: Path) -> None:
    from onestill.checkpoint import describe, verify
    from onestill.engine.openvino.shared_weights import read_index, read_int8
    from onestill.networks.denoiser import read_schedule
    from onestill.text.tokenize import PromptTokenizer

    def tokenized() -> None:
        PromptTokenizer(describe(folder), "tokenizer")(["a red star, é 漢"])

    def indexed() -> None:
        if (folder / "openvino/index.json").exists():
            [files.fingerprint() for files in read_index(folder).values()]
            read_int8(folder)

    for read in (lambda: verify(folder), lambda: describe(folder), tokenized, indexed, lambda: read_schedule(folder)):
        try:
            read()
        except OnestillError as error:
            check_sentence(error)


def _load_model(folder: Path) -> None:
    from onestill.pipeline import load

    load(folder, engine="openvino")("a red star", seed=0)


def _read_single_file(path: Path) -> None:
    from onestill.checkpoint import describe, identify, resolve, verify

    for read in (verify, identify, describe, resolve):
        try:
            read(path)
        except OnestillError as error:
            check_sentence(error)


def _read_lora(path: Path, pipeline: Any, model: Path) -> None:
    import copy

    from onestill.checkpoint import Additions, Lora, describe
    from onestill.networks.lora import add_loras

    info = describe(model, Additions(loras=(Lora(path, 1.0),)))
    add_loras({"unet": copy.deepcopy(pipeline.unet), "text_encoder": copy.deepcopy(pipeline.text_encoder)}, info)


def _recipes(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    for i, path in enumerate(sorted(ROOT.glob("recipes/*/**/*.toml"))):
        if "method =" in path.read_text(encoding="utf-8"):
            yield Path(shutil.copyfile(path, folder / f"{i:02d}-{path.name}"))


def _read_recipe(path: Path) -> None:
    from onestill.train.recipe import read_recipe

    read_recipe(path).fingerprint()


def _trained(folder: Path) -> Iterator[Target]:
    import torch

    from onestill.networks.contrastive import ContrastiveModel, new_backbone
    from onestill.train.state import TrainState, load_checkpoint, save_checkpoint, start_ema

    folder.mkdir(parents=True)

    def state() -> TrainState:
        network = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(network.parameters())
        network(torch.zeros(1, 3)).sum().backward()
        optimizer.step()
        ema = {"student": start_ema(network)}
        return TrainState({"student": network}, {"student": optimizer}, ema, torch.Generator())

    whole = state()
    whole.data = {"epoch": 0, "position": 7}
    save_checkpoint(whole, folder / "00000001", "{}")
    files = tuple(sorted((folder / "00000001").iterdir()))
    yield Target("checkpoints", files, lambda path: load_checkpoint(state(), path.parent, "{}"), 80)
    backbone = new_backbone("vit", channels=4, size=4, patch=1, width=32, depth=1)
    ContrastiveModel(backbone, 16, 32, {"space": "latents"}).save(folder / "tower")
    files = tuple(path for path in sorted((folder / "tower").rglob("*")) if path.is_file())
    yield Target("towers", files, lambda path: ContrastiveModel.load(folder / "tower"), 25)


# --- trying it ------------------------------------------------------------------------------------------------------


def check_sentence(error: OnestillError) -> None:
    """Raise AssertionError unless an error says in one line what to do."""
    text = str(error)
    assert 10 < len(text) < 2000, f"{len(text)} letters: {text[:200]!r}"
    assert "\n" not in text.strip(), f"several lines: {text[:200]!r}"


def attempt(target: Target, seed: int, number: int) -> str | None:
    """Damage one of a target's files, read it, put the file back; what was wrong with that, or None."""
    rng = random.Random(f"{target.name} {seed} {number}")
    path = rng.choice(target.files)
    content = path.read_bytes()
    path.write_bytes(damaged(rng, path, content))
    started = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(path)
        taken = time.monotonic() - started
        return f"{taken:.1f} s" if taken > SLOW_S else None
    except OnestillError as error:
        try:
            check_sentence(error)
        except AssertionError as wrong:
            return str(wrong)
        return None
    except Exception as error:
        ours = [
            f for f in traceback.extract_tb(error.__traceback__) if "onestill" in f.filename or "fuzz" in f.filename
        ]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{type(error).__name__} at {where}: {str(error)[:300]}"
    finally:
        path.write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        every = [one for one in targets(Path(scratch)) if not asked.targets or one.name in asked.targets]
        tried, end = 0, time.monotonic() + asked.seconds
        while time.monotonic() < end:
            for target in every:
                for number in range(tried, tried + 5):
                    if (wrong := attempt(target, asked.seed, number)) is not None:
                        found.setdefault(f"{target.name}: {wrong.split(':')[0]}", []).append(f"{number}: {wrong}")
            tried += 5
    for kind, each in sorted(found.items()):
        print(f"{len(each)} x {kind}\n    {each[0]}")
    print(f"{tried} damaged files of each of {len(every)} kinds, seed {asked.seed}: {len(found)} kinds of finding")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
