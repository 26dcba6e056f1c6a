"""API keys: `os-<id>-<secret>`, and what the server stores of one.

Only the SHA-256 of the whole key is stored. That is enough: the secret has 160 random bits, so no slow hash is needed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from onestill.errors import OnestillError

__all__ = ["KEY_FORM", "Key", "has_passed", "hash_of", "new_key", "read_expiry", "read_keys"]

KEY_FORM = re.compile(r"os-([0-9a-f]{8})-[0-9A-Za-z_-]{27}")
TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"
LINE = re.compile(rf"([0-9a-f]{{8}}) ([0-9a-f]{{64}}) (?:expires=({TIME}) )?(?!expires=)(\S.*)")
UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


@dataclass(frozen=True)
class Key:
    """What is stored of a key.

    Attributes:
        hashed: `hash_of` the key.
        daily: the pictures a day that it may draw; None is any number.
        expires: the time from which it is refused, as `2027-02-01T00:00:00Z`; None is never.
    """

    id: str
    name: str
    hashed: str
    daily: int | None = None
    expires: str | None = None


def has_passed(at: str) -> bool:
    """Whether a time, written as `Key.expires`, is not in the future."""
    return _text(datetime.now(UTC)) >= at


def read_expiry(text: str | None) -> str | None:
    """The time from which a key is refused, from `30d` (or `12h`, `8w`) or `2027-01-31`, which is its last day in UTC.

    Raises:
        OnestillError: the text is neither, or the time has passed.
    """
    if text is None:
        return None
    span = re.fullmatch(r"([0-9]{1,5})([hdw])", text.strip())
    try:
        if span is not None:
            at = datetime.now(UTC) + int(span[1]) * UNITS[span[2]]
        else:
            at = datetime.strptime(text.strip(), "%Y-%m-%d").replace(tzinfo=UTC) + UNITS["d"]
    except (ValueError, OverflowError) as error:
        raise OnestillError(
            f"The expiry '{text}' is not understood; write a span such as 30d, or a date such as 2027-01-31."
        ) from error
    if at <= datetime.now(UTC):
        raise OnestillError(f"The expiry '{text}' has passed; give a later one.")
    return _text(at)


def new_key() -> tuple[str, str]:
    """A new random key as (id, key). The key is shown once and never stored."""
    key_id = secrets.token_hex(4)
    return key_id, f"os-{key_id}-{secrets.token_urlsafe(20)}"


def hash_of(key: str) -> str:
    """The SHA-256 of a key in hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> dict[str, Key]:
    """The keys in a file, by id; each line is `ID SHA256 [expires=TIME] NAME`, as `onestill keys new --keys` writes it.

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
        match = LINE.fullmatch(line.strip())
        if match is None:
            raise OnestillError(f"Line {number} of '{path}' is not a key; make keys with 'onestill keys new'.")
        keys[match[1]] = Key(match[1], match[4], match[2], expires=match[3])
    return keys


def _text(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
