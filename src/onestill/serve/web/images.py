"""`POST /v1/images/generations` and `/edits`, in OpenAI's fields, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL.Image import Image
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Receive, Scope, Send

from onestill.serve.access.quota import Visitor
from onestill.serve.queue.jobs import Job, Picture
from onestill.serve.web.errors import ApiError, ErrorBody, error_object, from_validation, to_api_error
from onestill.serve.web.requests import KINDS, Edit, Generation, Shown, job_of, read_upload
from onestill.serve.web.state import Server

__all__ = ["REFUSALS", "checked", "json_body", "router_for", "unless_gone"]

MOST_JSON = 256 * 1024  # the longest prompt, every letter escaped, is a third of it

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
Form = TypeVar("Form", Generation, Edit, Shown)
QUICK_BYTES = 64 * 1024
WHOLE_FIELDS = ("seed", "n", "num_inference_steps", "output_compression", "partial_images")
DRAWN = {
    "description": "The pictures, as JSON or, with `stream`, as server-sent events.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["created", "data", "size", "output_format"],
                "properties": {
                    "created": {"type": "integer", "description": "Seconds since 1970."},
                    "data": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["seed"],
                            "properties": {
                                "b64_json": {"type": "string"},
                                "url": {"type": "string"},
                                "seed": {"type": "integer"},
                            },
                        },
                    },
                    "size": {"type": "string"},
                    "output_format": {"type": "string"},
                    "timings": {"type": "object", "additionalProperties": {"type": "number"}},
                    "notes": {"type": "array", "items": {"type": "string"}},
                },
            }
        },
        "text/event-stream": {
            "schema": {
                "type": "object",
                "required": ["data"],
                "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
            }
        },
    },
}


def router_for(server: Server) -> APIRouter:
    """The two routes, their OpenAPI schema with this model's sizes and bounds."""
    router = APIRouter(prefix="/v1/images", tags=["images"])
    edit_schema = server.forms.edit.model_json_schema()
    edit_schema["properties"] = {"image": {"type": "string", "format": "binary"}, **edit_schema["properties"]}
    edit_schema["required"] = ["image", *edit_schema["required"]]

    async def generations(request: Request) -> Response:
        """Draw from words."""
        visitor = await server.access.identify(request)
        form = checked(server, server.forms.generation, await json_body(request))
        job = job_of(form, server.info, request_id=request.headers.get("x-request-id"))
        return await _answer(server, request, visitor, form, job, "image_generation")

    async def edits(request: Request) -> Response:
        """Draw from words and a picture to start from: a form with the field `image`."""
        visitor = await server.access.identify(request)
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise ApiError(400, "The body must be a form: send it as multipart/form-data.", "invalid_body")
        form, image = await _form_and_image(server, request)
        job = job_of(form, server.info, image, request_id=request.headers.get("x-request-id"))
        return await _answer(server, request, visitor, form, job, "image_edit")

    def body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}

    router.add_api_route(
        "/generations",
        generations,
        methods=["POST"],
        responses={**REFUSALS, 200: DRAWN},
        response_class=JSONResponse,
        openapi_extra=body("application/json", server.forms.generation.model_json_schema()),
    )
    router.add_api_route(
        "/edits",
        edits,
        methods=["POST"],
        responses={**REFUSALS, 200: DRAWN},
        response_class=JSONResponse,
        openapi_extra=body("multipart/form-data", edit_schema),
    )
    return router


# --- reading --------------------------------------------------------------------------------------------------------


async def json_body(request: Request) -> Any:
    """The body of a request, read as JSON.

    Raises:
        ApiError: 400 or 413, it is none, or larger than any request has reason to be.
    """
    # A page of another site can post text/plain without asking, but not this.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "The body must be JSON: send it as Content-Type: application/json.", "invalid_body")
    body = await request.body()
    if len(body) > MOST_JSON:  # reading it would hold up everyone else
        raise ApiError(413, f"The body is too large; send at most {MOST_JSON // 1024} KB of JSON.", "too_large")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The body is no JSON; check its quotes and commas.", "invalid_body") from error


async def _form_and_image(server: Server, request: Request) -> tuple[Edit, Image]:
    """The fields of a multipart body, and its picture, fitted; nobody keeps the upload itself while they wait."""
    fields, upload = await _form(request)
    form = checked(server, server.forms.edit, fields)
    return form, await server.in_pool(read_upload, upload, form, server.info, server.bounds.upload_px)


async def _form(request: Request) -> tuple[dict[str, Any], bytes]:
    """The text fields of a multipart body, as what they stand for, and the bytes of its one image."""
    try:
        form = await request.form(max_files=2, max_fields=32, max_part_size=2**16)
    except (HTTPException, MultiPartException, AssertionError, ValueError) as error:
        raise ApiError(400, "The form is not understood; send multipart/form-data.", "invalid_body") from error
    try:
        return _text_fields(form), await _image_field(form)
    finally:
        await form.close()


def _text_fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in ("image", "image[]"):
            continue
        if name == "mask":
            raise ApiError(400, "Masks are not supported; leave 'mask' out.", "unsupported", param="mask")
        if isinstance(value, UploadFile):
            raise ApiError(400, f"'{name[:64]}' must be text, not a file.", "invalid_value", param=name[:64])
        if name in fields:
            raise ApiError(400, f"'{name[:64]}' is given twice.", "invalid_value", param=name[:64])
        fields[name] = _meant(name, value)
    return fields


def _meant(name: str, text: str) -> Any:
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


async def _image_field(form: FormData) -> bytes:
    images = [*form.getlist("image"), *form.getlist("image[]")]
    if len(images) != 1 or not isinstance(images[0], UploadFile):
        raise ApiError(400, "Send one picture as the file 'image'.", "invalid_image", param="image")
    return await images[0].read()


def checked(server: Server, kind: type[Form], fields: Any) -> Form:
    """A body as the request it must be; ApiError (400, 404) where it is none."""
    named = fields.get("model") if isinstance(fields, dict) else None
    if isinstance(named, str) and named != server.info.name:
        raise ApiError(
            404, f"There is no such model here; this server draws with '{server.info.name}'.", "model_not_found"
        )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, kind.model_fields) from error


# --- answering ------------------------------------------------------------------------------------------------------


async def _answer(
    server: Server, request: Request, visitor: Visitor, form: Generation, job: Job, event: str
) -> Response:
    await server.check_prompt(job.prompt)
    await server.access.check(visitor, len(job.seeds))
    if form.stream:
        return _streamed(server, visitor, form, job, event)
    future = server.scheduler.submit(job, visitor.name, visitor.address)
    pictures = await unless_gone(request, future)
    await server.check_pictures(pictures)
    await server.access.spend(visitor, len(pictures))
    data = []
    for picture in pictures:
        file = await _file(server, form, picture)
        data.append(await _written(server, form, file, {"seed": picture.seed}))
        server.count_picture("images", picture.timings)
    rest = {
        "created": int(time.time()),
        "size": f"{job.width}x{job.height}",
        "output_format": form.output_format or "png",
        "timings": {name: round(value, 2) for name, value in pictures[-1].timings.items()},
        "notes": list(dict.fromkeys(note for picture in pictures for note in picture.notes)),
    }
    body = b'{"data":[' + b",".join(data) + b"]," + json.dumps(rest).encode()[1:]
    return Response(body, media_type="application/json")


async def unless_gone(request: Request, future: Future[list[Picture]]) -> list[Picture]:
    """What a future brings, unless the client goes away before, which withdraws the job."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    result = asyncio.wrap_future(future)
    watch = asyncio.create_task(gone())
    try:
        waiting: set[asyncio.Future[Any]] = {result, watch}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ApiError(400, "The client went away.", "client_gone")
        return result.result()
    finally:
        watch.cancel()
        result.cancel()


def _streamed(server: Server, visitor: Visitor, form: Generation, job: Job, event: str) -> Response:
    loop = asyncio.get_running_loop()
    drawn: asyncio.Queue[Picture | None] = asyncio.Queue()

    def hand_over(item: Picture | None) -> None:
        with suppress(RuntimeError):  # the loop has closed: nobody listens
            loop.call_soon_threadsafe(drawn.put_nowait, item)

    future = server.scheduler.submit(
        job, visitor.name, visitor.address, on_picture=lambda index, picture: hand_over(picture)
    )
    future.add_done_callback(lambda done: hand_over(None))

    async def events() -> AsyncIterator[bytes]:
        try:
            while (picture := await drawn.get()) is not None:
                await server.check_pictures([picture])
                await server.access.spend(visitor, 1)
                file = await _file(server, form, picture)
                server.count_picture("images", picture.timings)
                name = f"{event}.completed"
                more = {
                    "type": name,
                    "created_at": int(time.time()),
                    "size": f"{job.width}x{job.height}",
                    "output_format": form.output_format or "png",
                    "quality": "auto",
                    "background": "opaque",
                    "seed": picture.seed,
                }
                yield _event(name, await _written(server, form, file, more))
            if not future.cancelled():
                future.result()
        except Exception as error:
            yield _event("error", json.dumps({"error": error_object(to_api_error(error))}).encode())
        yield b"data: [DONE]\n\n"

    return _Events(events(), future)


class _Events(StreamingResponse):
    """Server-sent events of a job, which is withdrawn when they end, also where the client left before the first."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], future: Future[list[Picture]]) -> None:
        super().__init__(events, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        self._future = future

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._future.cancel()


def _event(name: str, data: bytes) -> bytes:
    return f"event: {name}\n".encode() + b"data: " + data + b"\n\n"


async def _written(server: Server, form: Generation, file: bytes, more: dict[str, Any]) -> bytes:
    """The JSON object of one file; each by itself, as a large one would hold up everyone else."""

    def write() -> bytes:
        text = base64.b64encode(file).decode()
        url = f"data:image/{form.output_format or 'png'};base64,{text}"
        return json.dumps(({"url": url} if form.response_format == "url" else {"b64_json": text}) | more).encode()

    return write() if len(file) < QUICK_BYTES else await server.in_pool(write)


async def _file(server: Server, form: Generation, picture: Picture) -> bytes:
    quality = 95 if form.output_compression is None else form.output_compression
    kind = KINDS[form.output_format or "png"]
    return await server.signed(await server.file_of(picture, kind, quality), kind)
