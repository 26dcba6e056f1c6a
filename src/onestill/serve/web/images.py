"""`POST /v1/images/generations` and `/edits`, in OpenAI's fields, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from onestill.serve.access.quota import Visitor
from onestill.serve.errors import ApiError
from onestill.serve.queue.jobs import Picture
from onestill.serve.web.bodies import json_body, multipart_body, validate
from onestill.serve.web.errors import REFUSALS, content, error_object, to_api_error
from onestill.serve.web.requests import Generation, notes_on
from onestill.serve.web.server import Drawing, File, Server, Uploads, while_there

__all__ = ["images_router"]

Arrivals: TypeAlias = asyncio.Queue[Picture | None]  # pictures as they are drawn; None after the last
QUICK_BYTES = 64 * 1024  # writing at most that many as JSON takes less time than a hop to another thread
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
                    "background": {"type": "string"},
                    "usage": {"type": "object"},
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


class Answering(NamedTuple):
    """What an answer says beside its pictures: notes on the request, tokens of its prompt, whether it had an image."""

    notes: list[str]
    prompt_tokens: int
    has_image: bool

    def notes_with(self, pictures: Sequence[Picture]) -> list[str]:
        """These notes and the pictures' own, each once."""
        return list(dict.fromkeys([*self.notes, *(note for picture in pictures for note in picture.notes)]))

    def usage(self, drawing: Drawing[Generation], pictures: int) -> dict[str, Any]:
        """OpenAI's `usage`. A position of the model's latents is an image token; what was cut of a prompt is none."""
        info, job = drawing.server.info, drawing.job
        each = (job.height // info.vae_scale_factor) * (job.width // info.vae_scale_factor)
        read, drawn = each * self.has_image, each * pictures
        return {
            "input_tokens": self.prompt_tokens + read,
            "input_tokens_details": {"text_tokens": self.prompt_tokens, "image_tokens": read},
            "output_tokens": drawn,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
            "total_tokens": self.prompt_tokens + read + drawn,
        }


Queued: TypeAlias = tuple[Drawing[Generation], Arrivals | None, Answering]


def images_router(server: Server) -> APIRouter:
    """The two routes; their OpenAPI schema has this model's sizes and bounds."""
    router = APIRouter(prefix="/v1/images", tags=["images"])
    edit_schema = server.forms.edit.model_json_schema()
    files = {name: {"type": "string", "format": "binary"} for name in ("image", "mask")}
    edit_schema["properties"] = {**files, **edit_schema["properties"]}
    edit_schema["required"] = ["image", *edit_schema["required"]]

    async def generations(request: Request) -> Response:
        """Draw from a prompt."""
        visitor = await server.access.identify(request)
        form = validate(server, server.forms.generation, await json_body(request))
        return await _answer(request, await _queue(server, request, visitor, form), "image_generation")

    async def edits(request: Request) -> Response:
        """Draw from a prompt and a picture to start from: a form with the file `image`, and `mask` to draw a part."""
        return await _answer(request, await queue_edit(request), "image_edit")

    async def queue_edit(request: Request) -> Queued:
        # A call of its own, so that nothing holds the upload in memory while its request waits in the queue.
        visitor = await server.access.identify(request)
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise ApiError(400, "The body must be a form: send it as multipart/form-data.", "invalid_body")
        with server.uploads.share(visitor.source) as take:
            fields, uploads = await multipart_body(request, take)
            form = validate(server, server.forms.edit, fields)
            return await while_there(request, _queue(server, request, visitor, form, uploads))

    for route, media_type, schema in (
        (generations, "application/json", server.forms.generation.model_json_schema()),
        (edits, "multipart/form-data", edit_schema),
    ):
        router.add_api_route(
            f"/{route.__name__}",
            route,
            methods=["POST"],
            responses={**REFUSALS, 200: DRAWN},
            response_class=JSONResponse,
            openapi_extra={"requestBody": {"required": True, **content(media_type, schema)}},
        )
    return router


async def _queue(
    server: Server, request: Request, visitor: Visitor, form: Generation, uploads: Uploads | None = None
) -> Queued:
    """Queue a request; with `stream`, its pictures arrive in the second result as they are drawn."""
    image, mask, images = uploads or (None, None, 0)
    ask = partial(server.draw, visitor, form, image, mask=mask, request_id=request.headers.get("x-request-id"))
    more = Answering(notes_on(form, server.info, images), await server.count_tokens(form.prompt), bool(images))
    if not form.stream:
        return await ask(), None, more
    loop = asyncio.get_running_loop()
    arrivals: Arrivals = asyncio.Queue()

    def hand_over(item: Picture | None) -> None:
        with suppress(RuntimeError):  # the loop has closed: nobody listens
            loop.call_soon_threadsafe(arrivals.put_nowait, item)

    drawing = await ask(on_picture=lambda index, picture: hand_over(picture))
    drawing.future.add_done_callback(lambda done: hand_over(None))
    return drawing, arrivals, more


async def _answer(request: Request, queued: Queued, event: str) -> Response:
    drawing, arrivals, more = queued
    access = drawing.server.access
    if arrivals is not None:
        headers = await access.rate_headers(drawing.visitor)
        return _Events(_events(drawing, arrivals, event, more), drawing.future, headers)
    pictures = await drawing.pictures(request)
    data = []
    for file in await drawing.files(pictures):
        data.append(await _file_json(drawing, file, {"seed": file.picture.seed}))
        drawing.server.count_picture("images", file.picture.timings)
    rest = {
        "created": int(time.time()),
        **_description(drawing),
        "usage": more.usage(drawing, len(pictures)),
        "timings": {name: round(value, 2) for name, value in pictures[-1].timings.items()},
        "notes": more.notes_with(pictures),
    }
    body = b'{"data":[' + b",".join(data) + b"]," + json.dumps(rest).encode()[1:]
    return Response(body, media_type="application/json", headers=await access.rate_headers(drawing.visitor))


async def _events(
    drawing: Drawing[Generation], arrivals: Arrivals, event: str, more: Answering
) -> AsyncIterator[bytes]:
    try:
        while (picture := await arrivals.get()) is not None:
            (file,) = await drawing.files([picture])
            rest = {"created_at": int(time.time()), **_description(drawing), "quality": "auto", "seed": picture.seed}
            if picture.partial is None:
                name = f"{event}.completed"
                drawing.server.count_picture("images", picture.timings)
                rest |= {"usage": more.usage(drawing, 1), "notes": more.notes_with([picture])}
            else:
                name = f"{event}.partial_image"
                rest["partial_image_index"] = picture.partial
            yield _event(name, await _file_json(drawing, file, {"type": name, **rest}))
        if not drawing.future.cancelled():
            drawing.future.result()
    except Exception as error:
        yield _event("error", json.dumps({"error": error_object(to_api_error(error))}).encode())
    yield b"data: [DONE]\n\n"


class _Events(StreamingResponse):
    """Server-sent events of a job. It is withdrawn when they end, even where the client left before the first one."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], future: Future[list[Picture]], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(events, headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        self._future = future

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._future.cancel()


def _event(name: str, data: bytes) -> bytes:
    return f"event: {name}\n".encode() + b"data: " + data + b"\n\n"


def _description(drawing: Drawing[Generation]) -> dict[str, str]:
    return {
        "size": f"{drawing.job.width}x{drawing.job.height}",
        "output_format": drawing.form.encoding.kind.lower(),
        "background": "opaque",
    }


async def _file_json(drawing: Drawing[Generation], file: File, more: dict[str, Any]) -> bytes:
    """The JSON object of one file. Each is written by itself, as one large object would block the event loop."""

    def write() -> bytes:
        text = base64.b64encode(file.data).decode()
        if drawing.form.response_format == "url":
            return json.dumps({"url": f"data:image/{drawing.form.encoding.kind.lower()};base64,{text}"} | more).encode()
        return json.dumps({"b64_json": text} | more).encode()

    return write() if len(file.data) < QUICK_BYTES else await drawing.server.in_pool(write)
