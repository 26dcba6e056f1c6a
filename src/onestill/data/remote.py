"""Shards from a web server or an object store, copied whole into a folder: training reads at random places."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onestill.checkpoint import sha256
from onestill.errors import DataError, require

CHUNK = 1 << 20
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BROKEN = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    FileNotFoundError,
    PermissionError,
)


def expand(pattern: str) -> list[str]:
    """`shard-{000..002}.tar` -> shard-000.tar, shard-001.tar, shard-002.tar; WebDataset's notation."""
    found = RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if int(first) > int(last):
        raise DataError(f"the range in '{pattern}' falls: write the smaller number first.")
    made = []
    for number in range(int(first), int(last) + 1):
        filled = pattern[: found.start()] + f"{number:0{len(first)}d}" + pattern[found.end() :]
        made += expand(filled)
    return made


def fetch(url: str, folder: Path, hashes: Mapping[str, str] | None = None) -> Path:
    """Copy one shard into `folder` under its own name, unless it is there; what a break left is gone on with.

    Args:
        url: http, https, or what `fsspec` opens where its driver is installed (s3, gs, az...).
        hashes: SHA-256 by file name; where given, every file must be named and match.

    Raises:
        DataError: the shard is not there, is cut short, or is not what its hash says, also where it lay there before.
    """
    name = url.split("?", 1)[0].rsplit("/", 1)[-1]
    if name in ("", ".", ".."):
        raise DataError(f"'{url}' names no file: give the address of a shard, such as https://host/set-0000.tar.")
    path, partial = folder / name, folder / f".{name}.partial"
    if hashes is not None and name not in hashes:
        raise DataError(f"no SHA-256 is given for '{name}': add its line, or leave the list out.")
    if path.exists():
        if hashes is not None and sha256(path) != hashes[name]:
            raise DataError(f"'{path}' is there and is not what its SHA-256 says: delete it, and fetch it again.")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _from_web(url, partial) if url.startswith(("http://", "https://")) else _from_store(url, partial)
    except urllib.error.HTTPError as error:
        raise DataError(f"'{url}' cannot be had: the server says {error.code} {error.reason}.") from error
    except _BROKEN as error:
        raise DataError(f"'{url}' cannot be had ({error}): try again, and it goes on where it stopped.") from error
    if hashes is not None and sha256(partial) != hashes[name]:
        partial.unlink()
        raise DataError(f"'{name}' is not what its SHA-256 says: the copy is deleted; look at where it comes from.")
    os.replace(partial, path)
    return path


def read_hashes(path: Path) -> dict[str, str]:
    """Lines of `sha256sum`: the hash, blanks, the file's name."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    found = re.findall(r"^([0-9a-fA-F]{64})\s+\*?(.+?)\s*$", text, re.M)
    if not found:
        raise DataError(f"{path} holds no line of sha256sum: a hash, blanks, a file's name.")
    return {Path(name).name: digest.lower() for digest, name in found}


def _from_web(url: str, partial: Path) -> None:
    held = partial.stat().st_size if partial.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={held}-"} if held else {})
        response = urllib.request.urlopen(request, timeout=60)
    except (http.client.InvalidURL, ValueError) as error:
        raise DataError(
            f"'{url}' is no address ({error}): write blanks and letters beyond ASCII as %20 and the like."
        ) from error
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send: what is held is all
            raise
        error.close()
        return
    with response:
        on = response.status == 206  # a server that knows no ranges sends everything again
        length = response.headers.get("Content-Length")
        with partial.open("ab" if on else "wb") as file:
            shutil.copyfileobj(response, file, CHUNK)
        expected = None if length is None else int(length) + (held if on else 0)
    if expected is not None and partial.stat().st_size != expected:
        raise ConnectionError(f"{partial.stat().st_size} of {expected} bytes came")


def _from_store(url: str, partial: Path) -> None:
    fsspec: Any = require("fsspec", "train")
    try:
        system, place = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"'{url}' cannot be opened: {error}.") from error
    with system.open(place, "rb") as source, partial.open("wb") as file:
        shutil.copyfileobj(source, file, CHUNK)
