"""Why a request is refused or given up. Each error carries its own HTTP status and its code for programs."""

from __future__ import annotations

from collections.abc import Mapping

from onestill.errors import OnestillError

__all__ = ["ApiError", "Busy", "Closing", "EngineFault", "NotDrawn", "Superseded", "TooLate", "Unavailable"]


class ApiError(OnestillError):
    """A request that is refused.

    Args:
        status: the HTTP status: 4xx, 500 or 503.
        message: one sentence that names the fix.
        code: a word for programs.
        param: the field that is wrong.
        retry_after_s: when to try again; None where that is no help.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s
        self.headers = dict(headers or {})


class NotDrawn(ApiError):
    """A valid request that was given up. Each subclass names its status and code."""

    status = 503
    code: str

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(self.status, message, self.code, retry_after_s=retry_after_s)


class Busy(NotDrawn):
    """The queue is full."""

    status = 429
    code = "queue_full"


class Closing(NotDrawn):
    """The server is shutting down."""

    code = "closing"


class Superseded(NotDrawn):
    """A newer request of the same connection took its place."""

    code = "superseded"


class TooLate(NotDrawn):
    """It waited in the queue for longer than the limit."""

    code = "timeout"


class EngineFault(NotDrawn):
    """The engine failed, and the request was not the cause."""

    code = "engine_fault"


class Unavailable(NotDrawn):
    """The database does not answer."""

    code = "ledger_unavailable"
