"""Bodies of requests: JSON and multipart forms, read within bounds and validated."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from onestill.serve.errors import ApiError
from onestill.serve.web.errors import from_validation
from onestill.serve.web.requests import Edit, Generation, Shown
from onestill.serve.web.server import Server, Uploads

__all__ = ["json_body", "multipart_body", "validate"]

MOST_JSON = 256 * 1024  # three times the longest prompt with every character escaped
MOST_IMAGES = 16  # of a form, as in OpenAI's API
WHOLE_FIELDS = ("seed", "n", "num_inference_steps", "output_compression", "partial_images")
Body = TypeVar("Body", Generation, Edit, Shown)


def validate(server: Server, kind: type[Body], fields: Any) -> Body:
    """The fields of a body as a request of this class. Raises ApiError: 400 or 404, something is wrong with them."""
    named = fields.get("model") if isinstance(fields, dict) else None
    if isinstance(named, str):
        server.check_model(named)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, kind.model_fields) from error


async def json_body(request: Request) -> Any:
    """The body of a request, read as JSON.

    Raises:
        ApiError: 400, it is no JSON; 413, it is larger than any request needs to be.
    """
    # A page of another site can post text/plain without a preflight, but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "The body must be JSON: send it as Content-Type: application/json.", "invalid_body")
    too_large = ApiError(413, f"The body is too large; send at most {MOST_JSON // 1024} KB of JSON.", "too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MOST_JSON:
        raise too_large
    body = bytearray()
    async for data in request.stream():
        body += data
        if len(body) > MOST_JSON:
            raise too_large
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The body is not valid JSON; check its quotes and commas.", "invalid_body") from error


class _FormParser(MultiPartParser):
    spool_max_size = sys.maxsize  # in memory, where the sizes of all forms are bounded together


async def multipart_body(request: Request, take: Callable[[int], None]) -> tuple[dict[str, Any], Uploads]:
    """The text fields of a multipart body, converted to JSON's types, and its files.

    Args:
        request: whose body it is.
        take: is called with the size of each piece as it comes, and may raise to refuse it.
    """

    async def pieces() -> AsyncGenerator[bytes, None]:
        async for data in request.stream():
            take(len(data))
            yield data

    parser = _FormParser(request.headers, pieces(), max_files=MOST_IMAGES + 1, max_fields=32, max_part_size=MOST_JSON)
    try:
        form = await parser.parse()
    except (HTTPException, MultiPartException, AssertionError, ValueError) as error:
        raise ApiError(400, "The form cannot be read; send valid multipart/form-data.", "invalid_body") from error
    try:
        return _text_fields(form), await _files(form)
    finally:
        await form.close()


def _text_fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in ("image", "image[]", "mask"):
            continue
        if isinstance(value, UploadFile):
            raise ApiError(400, f"'{name[:64]}' must be text, not a file.", "invalid_value", param=name[:64])
        if name in fields:
            raise ApiError(400, f"'{name[:64]}' is given twice.", "invalid_value", param=name[:64])
        fields[name] = _field_value(name, value)
    return fields


def _field_value(name: str, text: str) -> Any:
    if text == "null" and name != "prompt":
        return None
    if name in WHOLE_FIELDS and re.fullmatch(r"-?\d{1,20}(\.0)?", text, re.ASCII):
        return int(text.removesuffix(".0"))
    if name == "stream" and text in ("true", "false"):
        return text == "true"
    if name == "strength":
        with suppress(ValueError):
            return float(text)
    return text


async def _files(form: FormData) -> Uploads:
    images = [*form.getlist("image"), *form.getlist("image[]")]
    if not 1 <= len(images) <= MOST_IMAGES or not isinstance(images[0], UploadFile):
        raise ApiError(400, "Send a picture as the file 'image'.", "invalid_image", param="image")
    masks = form.getlist("mask")
    if not masks:
        return Uploads(await images[0].read(), None, len(images))
    if len(masks) > 1 or not isinstance(masks[0], UploadFile):
        raise ApiError(400, "Send the mask as one file 'mask'.", "invalid_image", param="mask")
    return Uploads(await images[0].read(), await masks[0].read(), len(images))
