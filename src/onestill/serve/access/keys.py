"""API keys: `os-<id>-<secret>`, and what the server stores of one.

Only the SHA-256 of the whole key is stored. That is enough: the secret has 160 random bits, so no slow hash is needed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from onestill.errors import OnestillError

__all__ = ["KEY_FORM", "Key", "hash_of", "new_key", "read_keys"]

KEY_FORM = re.compile(r"os-([0-9a-f]{8})-[0-9A-Za-z_-]{27}")


@dataclass(frozen=True)
class Key:
    """What is stored of a key: `hashed` is `hash_of` it, `daily` the pictures a day it may draw, None any number."""

    id: str
    name: str
    hashed: str
    daily: int | None = None


def new_key() -> tuple[str, str]:
    """A new random key as (id, key). The key is shown once and never stored."""
    key_id = secrets.token_hex(4)
    return key_id, f"os-{key_id}-{secrets.token_urlsafe(20)}"


def hash_of(key: str) -> str:
    """The SHA-256 of a key in hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> dict[str, Key]:
    """The keys in a file, by id; each line is `ID SHA256 NAME`, as `onestill keys new --keys FILE` writes it.

    Raises:
        OnestillError: the file cannot be read, or a line has another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OnestillError(f"The keys in '{path}' cannot be read; make them with 'onestill keys new'.") from error
    keys = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-f]{8}) ([0-9a-f]{64}) (\S.*)", line.strip())
        if match is None:
            raise OnestillError(f"Line {number} of '{path}' is not a key; make keys with 'onestill keys new'.")
        keys[match[1]] = Key(match[1], match[3], match[2])
    return keys
