"""The files of a model: reading JSON, checking that nothing is missing, truncated or changed, writing whole files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from onestill.errors import CheckpointError, UnsafeFormatError

__all__ = [
    "MANIFEST",
    "PICKLE_SUFFIXES",
    "cache_folder",
    "pickle_error",
    "read_json",
    "sha256",
    "verify",
    "weights_file",
    "written_whole",
]

MANIFEST = "onestill.json"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
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


def pickle_error(path: Path) -> UnsafeFormatError:
    """The error for a file that is never opened."""
    return UnsafeFormatError(
        f"'{path}' is a pickle, which can run code when it is read; save the model again with safe_serialization=True."
    )


# --- whether its files are whole ------------------------------------------------------------------------------------


def verify(path: str | os.PathLike[str], *, contents: bool = False, use_stamps: bool = True) -> None:
    """Check that a model's files are all there and whole.

    Args:
        path: the model's folder.
        contents: also compare every file with its SHA-256 in the manifest, where there is one.
        use_stamps: with `contents`, skip files that have not been touched since they were last found right.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the sentence names it.
        UnsafeFormatError: a component's weights are there only as a pickle.
    """
    folder = Path(path)
    index = read_json(folder, "model_index.json")
    manifest = read_json(folder, MANIFEST) if (folder / MANIFEST).is_file() else {}
    for component in ("text_encoder", "unet", "vae"):
        if component in index:
            weights_file(folder, component)
    files = manifest.get("files", {})
    if not isinstance(files, dict) or not all(_is_listed(name, facts) for name, facts in files.items()):
        raise CheckpointError(f"'{folder / MANIFEST}' lists its files in no known form; copy the model again.")
    for file in sorted(folder.rglob("*.safetensors")):
        _check_safetensors(file)
    for name, facts in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"'{folder}' has no {name}; copy the whole model again.")
        if (folder / name).stat().st_size != facts["size"]:
            raise _changed_error(folder / name)
    if contents and files:
        _check_contents(folder, files, use_stamps)


def weights_file(folder: Path, component: str) -> Path:
    """The safetensors file of one component: the plain one, else the fp16 variant.

    Raises:
        UnsafeFormatError: the weights are there only as a pickle.
        CheckpointError: there are none.
    """
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    names = [f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors"]
    for name in names:
        if (folder / component / name).is_file():
            return folder / component / name
    pickles = sorted(file for file in (folder / component).glob("*") if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise pickle_error(pickles[0])
    raise CheckpointError(f"'{folder / component}' has no {names[0]}; copy the whole model again.")


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


def _check_safetensors(path: Path) -> None:
    """Compare a file's length with its header: 8 bytes of header length, the header, then every tensor in turn."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            if length > min(size, MAX_JSON_BYTES):
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
            end = 8 + length + max((at["data_offsets"][1] for at in header.values() if "data_offsets" in at), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"'{path}' is no safetensors file, or is damaged; copy the model again.") from error
    if size < end:
        raise CheckpointError(f"'{path}' is truncated: it has {size} of {end} bytes; copy the model again.")
    if size > end:
        raise _changed_error(path)


def _check_contents(folder: Path, files: Mapping[str, Mapping[str, Any]], use_stamps: bool) -> None:
    # Hashing costs a tenth of a second, every start; so what was found right is remembered with the files' times.
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


def cache_folder() -> Path:
    """Where what can be made again is kept: `ONESTILL_CACHE`, else the system's place for caches. May not exist."""
    if told := os.environ.get("ONESTILL_CACHE"):
        return Path(told)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "onestill"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "onestill"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onestill"


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
        unfinished.unlink(missing_ok=True)


def _link(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)  # fails where `path` exists, which no check beforehand can promise
    except FileExistsError:
        raise
    except OSError:  # of file systems without hard links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        unfinished.replace(path)
