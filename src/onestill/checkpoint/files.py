"""The files of a model: reading JSON, checking that nothing is missing, truncated or changed, writing whole files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from onestill.checkpoint.header import PICKLE_SUFFIXES, check_safetensors, pickle_error
from onestill.errors import CheckpointError

MANIFEST = "onestill.json"
NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")  # diffusers' names of a model's components with weights
SEAL = b"onestill seal 1\n"
MAX_JSON_BYTES = 64 * 2**20  # of a config; a larger one is no config


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in one file of a model.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    path = folder / name
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("too large")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"'{folder}' has no {name}; copy the whole model again.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not valid JSON; copy the model again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' is not valid JSON; copy the model again.")
    return value


# --- whether its files are whole ------------------------------------------------------------------------------------


def verify(path: str | os.PathLike[str], *, contents: bool = False, use_stamps: bool = True) -> None:
    """Check that a model's files are all there and whole.

    Args:
        path: the model's folder, or a single safetensors file.
        contents: also compare every file with its SHA-256 in the manifest, where there is one.
        use_stamps: with `contents`, skip files that have not been touched since they were last found right.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the sentence names it.
        UnsafeFormatError: a component's weights are there only as a pickle.
    """
    folder = Path(path)
    if folder.is_file():
        check_safetensors(folder)
        return
    index = read_json(folder, "model_index.json")
    manifest = read_json(folder, MANIFEST) if (folder / MANIFEST).is_file() else {}
    form = folder / "openvino" / "index.json"
    holds_weights = form.is_file() and "sizes" in read_json(form.parent, form.name)
    if holds_weights:
        _check_sizes(form)
    for component in NETWORKS:
        named = index.get(component)
        if isinstance(named, list) and named and named[0] and not holds_weights:
            weights_file(folder, component)
    files = manifest.get("files", {})
    if not isinstance(files, dict) or not all(_is_listed(name, facts) for name, facts in files.items()):
        raise CheckpointError(f"'{folder / MANIFEST}' lists its files in no known form; copy the model again.")
    for file in sorted(folder.rglob("*.safetensors")):
        check_safetensors(file)
    for name, facts in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"'{folder}' has no {name}; copy the whole model again.")
        if (folder / name).stat().st_size != facts["size"]:
            raise _changed_error(folder / name)
    if contents and (files := {**files, **_form_hashes(form)}):
        check_contents(folder, files, use_stamps)


def _check_sizes(form: Path) -> None:
    """Compare the files of an OpenVINO form that holds a model's only weights with the sizes it was written in."""
    sizes = read_json(form.parent, form.name)["sizes"]
    for name, size in sizes.items() if isinstance(sizes, dict) else ():
        file = form.parent / PurePosixPath(name).name
        if not file.is_file():
            raise CheckpointError(f"'{form.parent}' has no {file.name}; copy the whole model again.")
        if file.stat().st_size != size:
            raise CheckpointError(f"'{file}' has {file.stat().st_size} of {size} bytes; copy the model again.")


def _form_hashes(form: Path) -> dict[str, dict[str, str]]:
    """The SHA-256 of such a form's files, by their names in the model's folder, as far as it was written with them."""
    hashes = read_json(form.parent, form.name).get("sha256") if form.is_file() else None
    named = hashes.items() if isinstance(hashes, dict) else ()
    return {f"{form.parent.name}/{PurePosixPath(name).name}": {"sha256": str(one)} for name, one in named}


def weights_file(folder: Path, component: str, *, half: bool = False) -> Path:
    """The safetensors file of one component, or the index of its shards: the plain one, else the fp16 variant.

    Args:
        folder: the model's folder.
        component: "unet", "vae", "text_encoder", ...
        half: take the fp16 variant first, which is half the reading where half is what is computed in.

    Raises:
        UnsafeFormatError: the weights are there only as a pickle.
        CheckpointError: there are none, or a shard that the index lists is missing.
    """
    stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
    plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    halved = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", f"{stem}.fp16.safetensors.index.json"]
    for name in halved + plain if half else plain + halved:
        path = folder / component / name
        if path.is_file():
            for shard in shards(path) if path.suffix == ".json" else ():
                if not (path.parent / shard).is_file():
                    raise CheckpointError(f"'{path.parent}' has no {shard}; copy the whole model again.")
            return path
    pickles = sorted(file for file in (folder / component).glob("*") if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise pickle_error(pickles[0])
    raise CheckpointError(f"'{folder / component}' has no {plain[0]}; copy the whole model again.")


def shards(index: Path) -> set[str]:
    """The names of the files that an index of sharded weights lists."""
    places = read_json(index.parent, index.name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and "/" not in name for name in places.values()):
        raise CheckpointError(f"'{index}' lists its shards in no known form; copy the model again.")
    return set(places.values())


def _is_listed(name: str, facts: object) -> bool:
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and isinstance(facts, dict)
        and {"size", "sha256"} <= set(facts)
    )


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what is cached, which nobody publishes a hash of ---------------------------------------------------------------


def seal(content: bytes | memoryview) -> bytes:
    """What a cached file ends in behind its content: the content's CRC, which takes 0.3 ms for a megabyte."""
    return zlib.crc32(content).to_bytes(4, "little") + SEAL


def unsealed(file: memoryview) -> memoryview | None:
    """The content of a cached file, None where it is not what was written."""
    content = file[: -4 - len(SEAL)]
    return content if file[len(content) :] == seal(content) else None


def check_contents(folder: Path, files: Mapping[str, Mapping[str, Any]], use_stamps: bool) -> None:
    """Compare files with their SHA-256; `files` is name in `folder` -> an object with `sha256`."""
    # Hashing the shipped model takes a tenth of a second at every start, so files found right are remembered with
    # their sizes and times.
    stamp_file = cache_folder() / "verified" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"
    stamps = _read_stamps(stamp_file) if use_stamps else {}
    found = {name: [facts["sha256"], *_touched(folder / name)] for name, facts in files.items()}
    for name, stamp in found.items():
        if stamps.get(name) != stamp and sha256(folder / name) != stamp[0]:
            raise _changed_error(folder / name)
    if found != stamps:
        with suppress(OSError), written_whole(stamp_file) as unfinished:
            unfinished.write_text(json.dumps(found))


def _read_stamps(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        stamps = json.loads(path.read_bytes())
        return stamps if isinstance(stamps, dict) else {}
    return {}


def _touched(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _changed_error(path: Path) -> CheckpointError:
    return CheckpointError(f"'{path}' is not the file that the model was published with; copy the model again.")


# --- places and files -----------------------------------------------------------------------------------------------


def home() -> Path:
    """The user's home folder; where the system knows none, a path at which nothing can be read or written."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


def cache_folder() -> Path:
    """The folder of caches: `ONESTILL_CACHE`, else the operating system's own. It may not exist."""
    if folder := os.environ.get("ONESTILL_CACHE"):
        return Path(folder)
    if sys.platform == "darwin":
        return home() / "Library" / "Caches" / "onestill"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home()) / "onestill"
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "onestill"


@contextmanager
def written_whole(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a path to write to, which becomes `path` at the end of the body, or is removed where the body fails.

    Another process sees the old file, or none, or the whole new one. Folders above are made.

    Raises:
        FileExistsError: `path` exists and `replace` is not set.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{secrets.token_hex(8)}.part")  # tempfile would make it readable by its owner only
    try:
        yield unfinished
        if not replace:
            _link(unfinished, path)
        else:
            unfinished.replace(path)
    finally:
        try:
            unfinished.unlink(missing_ok=True)
        except KeyboardInterrupt:  # which came between
            unfinished.unlink(missing_ok=True)
            raise


def _link(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)  # fails where `path` exists, which no check beforehand can promise
    except FileExistsError:
        raise
    except OSError:  # of file systems without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        unfinished.replace(path)
