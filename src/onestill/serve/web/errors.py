"""Errors as answers, in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse

from onestill.errors import OnestillError, near
from onestill.serve.errors import ApiError

__all__ = ["REFUSALS", "ErrorBody", "content", "error_object", "from_validation", "response_of", "to_api_error"]

LOG = logging.getLogger("onestill.serve")
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class _Error(BaseModel):
    model_config = ConfigDict(title="Error")

    message: str = Field(description="One sentence that names the fix.")
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: _Error


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "Something in the request is wrong; the message names it."},
    401: {"model": ErrorBody, "description": "A key is needed, or the one that was sent is not valid."},
    403: {"model": ErrorBody, "description": "An unknown Host, or a foreign Origin."},
    404: {"model": ErrorBody, "description": "Another model was asked for than the one there is."},
    408: {"model": ErrorBody, "description": "The body came too slowly."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    429: {"model": ErrorBody, "description": "The queue is full, or the day's pictures are used up; see Retry-After."},
    503: {"model": ErrorBody, "description": "The server is closing, or the engine fails; see Retry-After."},
}


def content(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The `content` of a body or answer in OpenAPI."""
    return {"content": {media_type: {"schema": schema}}}


def error_object(error: ApiError) -> dict[str, Any]:
    """The object `error` of an answer."""
    kind = TYPES.get(error.status, "invalid_request_error")
    return {"message": str(error), "type": kind, "param": error.param, "code": error.code}


def response_of(error: ApiError) -> JSONResponse:
    """The response to an error, with `Retry-After` (whole seconds) and `WWW-Authenticate` where they apply."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": error_object(error)}, error.status, headers)


def to_api_error(error: Exception) -> ApiError:
    """Any error as one that carries its answer.

    An ApiError knows its own status; any other error of the package is a mistake in the request (400). What is no error
    of the package is a fault of the server (500): it is logged, and the answer says nothing about it.
    """
    if not isinstance(error, OnestillError):
        LOG.error("A request failed.", exc_info=error)
        return ApiError(500, "The server failed; its log says more.", "server_fault")
    if isinstance(error, ApiError):
        return error
    return ApiError(400, str(error), "invalid_value")


def from_validation(error: ValidationError, names: Mapping[str, Any]) -> ApiError:
    """The first mistake in a request, in one sentence. It does not repeat what was sent.

    Args:
        error: from pydantic.
        names: the known fields, to suggest one for an unknown name.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in found["loc"]) or None
    if found["type"] == "extra_forbidden":
        name = str(found["loc"][-1])[:64]
        # A name that is no valid Unicode text cannot be sent back.
        shown = name if name.isprintable() else "?"
        return ApiError(400, f"There is no parameter '{shown}'.{near(shown, names)}", "unknown_parameter", param=shown)
    if found["type"] == "string_pattern_mismatch" and where == "prompt":
        return ApiError(400, "The prompt is empty; say what to draw.", "invalid_value", param=where)
    message = found["msg"].removeprefix("Value error, ")
    if where is None:
        return ApiError(400, f"The body is not understood: {message}.", "invalid_body")
    return ApiError(400, f"'{where}' is wrong: {message[:1].lower()}{message[1:]}.", "invalid_value", param=where)
