"""The server's log on standard error: one line an event, as text or as JSON.

Lines never contain a prompt, a key or an address; a path is logged as its route, such as `/v1/models/{name}`.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

__all__ = ["REQUEST_ID", "LogFormat", "LogLevel", "log_to_stderr", "valid_request_id"]

LogFormat = StrEnum("LogFormat", ["TEXT", "JSON"])
LogLevel = StrEnum("LogLevel", ["DEBUG", "INFO", "WARNING", "ERROR"])

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # of the request that the current task answers


def valid_request_id(asked: str | None) -> str:
    """The id that a client or proxy gave its request, or a new one where that is missing or no plain word."""
    plain = asked is not None and re.fullmatch(r"[A-Za-z0-9._~:/+=@-]{1,128}", asked)
    return asked if asked is not None and plain else secrets.token_hex(8)


def log_to_stderr(form: LogFormat, level: LogLevel) -> None:
    """Send the log to standard error: the package's from this level on, warnings of libraries in the same form."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Text() if form == LogFormat.TEXT else _Json())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("onestill").setLevel(level.upper())


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says beside its message: the request's id, and what was logged with `extra={"fields": ...}`."""
    name = REQUEST_ID.get()
    return ({"request_id": name} if name else {}) | getattr(record, "fields", {})


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{_time(record)} {record.levelname.lower():7} {' '.join(record.getMessage().split())}{fields}{trace}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
