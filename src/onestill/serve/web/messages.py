"""The socket's messages: JSON text, or binary with pictures.

A binary message is a 4-byte big-endian length, a JSON header of that length, and the bytes of one picture, or of
several, whose sizes stand in the header's `lengths`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from onestill.serve.errors import ApiError
from onestill.serve.web.requests import LARGEST_SEED

__all__ = ["id_in", "pack", "read_message", "unpack"]

MOST_JSON = 64 * 1024  # of a message: the longest prompt fits, and parsing that much does not block the event loop


def pack(header: Mapping[str, Any], data: bytes) -> bytes:
    """A binary message."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(4, "big") + text + data


def unpack(message: bytes) -> tuple[Any, bytes]:
    """The header and the remaining bytes of a binary message.

    Raises:
        ValueError: the message has another form.
    """
    size = int.from_bytes(message[:4], "big")
    if len(message) < 4 + size or size > MOST_JSON:
        raise ValueError("the length is wrong")
    return json.loads(message[4 : 4 + size]), message[4 + size :]


def read_message(message: str | bytes, most: int) -> tuple[Any, bytes]:
    """The fields of a message, and the bytes that came with them.

    Args:
        message: as it was received.
        most: bytes that a binary message may have.

    Raises:
        ApiError: 413, it is too large; 400, it has another form.
    """
    if len(message) > (MOST_JSON if isinstance(message, str) else most):
        raise ApiError(413, "The message is too large.", "too_large")
    try:
        return (json.loads(message), b"") if isinstance(message, str) else unpack(message)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The message is not valid JSON; see docs/serve.md.", "invalid_body") from error


def id_in(fields: Any) -> int | None:
    """The id in a message that may be wrong otherwise, so that its error can name it."""
    found = fields.get("id") if isinstance(fields, dict) else None
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= LARGEST_SEED else None
