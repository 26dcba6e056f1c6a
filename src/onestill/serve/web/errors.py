"""What goes wrong, told as OpenAI's API tells it: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse

from onestill.errors import OnestillError, near
from onestill.serve.queue.jobs import Busy, NotDrawn

__all__ = ["ApiError", "ErrorBody", "error_object", "from_validation", "response_of", "to_api_error"]

LOG = logging.getLogger("onestill.serve")
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(OnestillError):
    """A request that is refused.

    Args:
        status: of HTTP, 4xx, 500 or 503.
        message: one sentence that names the fix.
        code: a word for programs.
        param: the field that is wrong.
        retry_after_s: when to try again.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s


class _Error(BaseModel):
    model_config = ConfigDict(title="Error")

    message: str = Field(description="One sentence that names the fix.")
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refusal looks like."""

    error: _Error


def error_object(error: ApiError) -> dict[str, Any]:
    """The inner object of the envelope."""
    kind = TYPES.get(error.status, "invalid_request_error")
    return {"message": str(error), "type": kind, "param": error.param, "code": error.code}


def response_of(error: ApiError) -> JSONResponse:
    """The response for an error, with `Retry-After` (whole seconds) and `WWW-Authenticate` where they belong."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": error_object(error)}, error.status, headers)


def to_api_error(error: Exception) -> ApiError:
    """An error as an answer: the server's trouble is 429 or 503, the rest of the package's the asker's mistake.

    What is no error of the package is a fault of the server: it is logged, and the answer, 500, tells nothing of it.
    """
    if not isinstance(error, OnestillError):
        LOG.error("A request failed.", exc_info=error)
        return ApiError(500, "The server failed; its log says more.", "server_fault")
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), "queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, NotDrawn):
        code = {
            "Closing": "closing",
            "TooLate": "timeout",
            "Superseded": "superseded",
            "Unavailable": "ledger_unavailable",
        }.get(type(error).__name__, "engine_fault")
        return ApiError(503, str(error), code, retry_after_s=error.retry_after_s)
    return ApiError(400, str(error), "invalid_value")


def from_validation(error: ValidationError, names: Mapping[str, Any]) -> ApiError:
    """The first thing that is wrong with a body, in one sentence. What was sent is not repeated.

    Args:
        error: what pydantic found.
        names: the fields there are, to suggest one for a name that is unknown.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in found["loc"]) or None
    if found["type"] == "extra_forbidden":
        name = str(found["loc"][-1])[:64]
        # A name that is no valid Unicode text cannot be repeated.
        shown = name if name.isprintable() else "?"
        return ApiError(400, f"There is no parameter '{shown}'.{near(shown, names)}", "unknown_parameter", param=shown)
    if found["type"] == "string_pattern_mismatch" and where == "prompt":
        return ApiError(400, "The prompt is empty; say what to draw.", "invalid_value", param=where)
    said = found["msg"].removeprefix("Value error, ")
    if where is None:
        return ApiError(400, f"The body is not understood: {said}.", "invalid_body")
    return ApiError(400, f"'{where}' is wrong: {said[:1].lower()}{said[1:]}.", "invalid_value", param=where)
