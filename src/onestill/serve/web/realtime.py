"""`WS /v1/realtime`: a picture for every message, or word of why there is none. Exactly one answer to each.

Up: JSON text, or binary with an image to start from. Down: `ready`, then for each message a binary picture, or text
`superseded` or `error`. A binary message is a 4-byte big-endian length, a JSON header of that length, and the bytes of
one picture, or of `n` whose sizes the header's `lengths` tells.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from onestill.serve.access.quota import Visitor, network
from onestill.serve.access.rate_limit import Bucket
from onestill.serve.queue.jobs import Job, Picture, Superseded
from onestill.serve.web.errors import ApiError, error_object, from_validation, to_api_error
from onestill.serve.web.requests import KINDS, LARGEST_SEED, Live, job_of, read_upload
from onestill.serve.web.state import Server

__all__ = ["converse", "name_in", "opened", "packed", "unpacked"]

PROTOCOL = "onestill.v1"
KEY_PROTOCOL = "onestill.key."
UNANSWERED = 32  # messages whose answers are not sent yet; beyond that no more are read
MOST_JSON = 64 * 1024  # of a message: the longest prompt fits, and reading it holds nobody up
SEND_S = 20.0  # a client that takes nothing for so long is cut off
DEFAULT_QUALITY = 85
REFUSED, FAILED, TRY_LATER = 1008, 1011, 1013  # why a socket is closed


def packed(header: Mapping[str, Any], data: bytes) -> bytes:
    """A binary message."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(4, "big") + text + data


def unpacked(message: bytes) -> tuple[Any, bytes]:
    """The header and the rest of a binary message.

    Raises:
        ValueError: it is none.
    """
    size = int.from_bytes(message[:4], "big")
    if len(message) < 4 + size or size > MOST_JSON:
        raise ValueError("the length is wrong")
    return json.loads(message[4 : 4 + size]), message[4 + size :]


async def converse(server: Server, socket: WebSocket) -> None:
    """Serve one live connection until either side ends it."""
    offered = [name.strip() for name in socket.headers.get("sec-websocket-protocol", "").split(",")]
    # A browser cannot set headers on a socket; a key in the address would end up in logs.
    key = next((_key_in(name) for name in offered if name.startswith(KEY_PROTOCOL)), None)
    await socket.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
    address = network(socket.client.host if socket.client else "")
    if server.live.total() >= server.bounds.live or server.live[address] >= server.bounds.live_each:
        await _refuse(socket, ApiError(429, "Too many live connections; close one.", "too_many_connections"))
        return
    server.live[address] += 1
    try:
        try:
            visitor = await server.access.identify(socket, key)
        except Exception as error:
            await _refuse(socket, to_api_error(error))
            return
        with suppress(WebSocketDisconnect, TimeoutError):  # it left, or took nothing
            await _Connection(server, socket, key, visitor).run()
    finally:
        server.live[address] -= 1
        if not server.live[address]:
            del server.live[address]


async def _refuse(socket: WebSocket, error: ApiError) -> None:
    """Say why there is no live connection, and close it."""
    with suppress(WebSocketDisconnect, RuntimeError):
        await socket.send_text(json.dumps({"type": "error", "id": None, "error": error_object(error)}))
        await socket.close(REFUSED if error.status == 401 else TRY_LATER)


def _key_in(protocol: str) -> str:
    text = protocol.removeprefix(KEY_PROTOCOL)
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii")
    except ValueError:
        return "unreadable"


class _Answer(NamedTuple):
    """What has become of the message `id`; `form` is None where it could not be read."""

    id: int | None
    result: Future[list[Picture]] | ApiError
    form: Live | None
    came: float  # by time.perf_counter


class _Connection:
    """One reader, one sender, and between them the answers in the order they became known."""

    def __init__(self, server: Server, socket: WebSocket, key: str | None, visitor: Visitor) -> None:
        self._server = server
        self._socket = socket
        self._key = key
        self._visitor = visitor
        self._slot = server.scheduler.slot()
        self._answers: asyncio.Queue[_Answer] = asyncio.Queue()
        self._room = asyncio.Semaphore(UNANSWERED)
        each_s = server.bounds.messages_each_s
        self._rate = Bucket(each_s, 2 * each_s)
        self._quota_short = True  # a message may ask for more than is left, so one looks before drawing
        self._close_code = FAILED

    async def run(self) -> None:
        await self._send(json.dumps(self._ready()))
        sender = asyncio.create_task(self._answer_all())
        reader = asyncio.create_task(self._read_all())
        try:
            await asyncio.wait({sender, reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._slot.close()
            for task in (sender, reader):
                task.cancel()
            results = await asyncio.gather(sender, reader, return_exceptions=True)
            if self._socket.application_state is WebSocketState.CONNECTED:
                with suppress(Exception):
                    await asyncio.wait_for(self._socket.close(self._close_code), 1)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    def _ready(self) -> dict[str, Any]:
        info, bounds = self._server.info, self._server.bounds
        return {
            "type": "ready",
            "model": info.name,
            "limits": {
                "prompt": bounds.prompt,
                "n": bounds.live_n,
                "num_inference_steps": bounds.steps,
                "sizes": [f"{width}x{height}" for height, width in info.sizes],
                "message_bytes": bounds.message,
                "messages_per_second": bounds.messages_each_s,
            },
        }

    # --- up ---------------------------------------------------------------------------------------------------------

    async def _read_all(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            came = time.perf_counter()
            await self._room.acquire()
            await self._take(message.get("text"), message.get("bytes"), came)

    async def _take(self, text: str | None, data: bytes | None, came: float) -> None:
        name: int | None = None
        try:
            in_time = self._rate.take()
            fields, image = opened(data or b"" if text is None else text, self._server.bounds.message)
            name = name_in(fields)
            if not in_time:
                each_s = self._server.bounds.messages_each_s
                raise ApiError(429, f"Send at most {each_s:g} messages a second.", "rate_limit", retry_after_s=1)
            self._visitor = await self._server.access.identify(self._socket, self._key)  # keys are revoked meanwhile
            form = self._server.forms.live.model_validate(fields)
            await self._server.check_prompt(form.prompt)
            if self._quota_short:  # it may be another day by now
                await self._server.access.check(self._visitor, form.n or 1)
                self._quota_short = False
            picture = (
                await self._server.in_pool(read_upload, image, form, self._server.info, self._server.bounds.upload_px)
                if image
                else None
            )
            self._queue(form, job_of(form, self._server.info, picture), came)
        except ValidationError as error:
            refusal = from_validation(error, self._server.forms.live.model_fields)
            self._answers.put_nowait(_Answer(name, refusal, None, came))
        except Exception as error:
            self._answers.put_nowait(_Answer(name, to_api_error(error), None, came))

    def _queue(self, form: Live, job: Job, came: float) -> None:
        loop = asyncio.get_running_loop()
        future = self._slot.put(job)

        def done(future: Future[list[Picture]]) -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(self._answers.put_nowait, _Answer(form.id, future, form, came))

        future.add_done_callback(done)

    # --- down -------------------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        while self._close_code != REFUSED:
            answer = await self._answers.get()
            message: str | bytes
            try:
                kind, message = "image", await self._picture(answer)
            except Superseded:
                kind, message = "superseded", json.dumps({"type": "superseded", "id": answer.id})
            except CancelledError:
                return  # the slot was closed: the connection is over
            except Exception as error:
                kind, message = "error", self._error(answer.id, to_api_error(error))
            await self._send(message)
            self._server.metrics.count("onestill_live_answers_total", answer=kind)
            self._room.release()

    def _error(self, name: int | None, refusal: ApiError) -> str:
        self._quota_short |= refusal.code == "insufficient_quota"
        if refusal.status == 401:
            self._close_code = REFUSED
        told: dict[str, Any] = {"type": "error", "id": name, "error": error_object(refusal)}
        if refusal.retry_after_s is not None:
            told["retry_after_s"] = round(refusal.retry_after_s, 1)
        return json.dumps(told)

    async def _picture(self, answer: _Answer) -> bytes:
        server, form = self._server, answer.form
        if isinstance(answer.result, ApiError) or form is None:
            raise answer.result if isinstance(answer.result, ApiError) else RuntimeError
        pictures = answer.result.result()
        await server.check_pictures(pictures)
        started = time.perf_counter()
        kind = form.format or "jpeg"
        quality = DEFAULT_QUALITY if form.quality is None else form.quality
        files = [await server.file_of(picture, KINDS[kind], quality) for picture in pictures]
        compress_ms = (time.perf_counter() - started) * 1000
        await server.access.spend(self._visitor, len(pictures))
        timings = {**pictures[-1].timings, "compress_ms": compress_ms}
        for picture in pictures:
            server.count_picture("realtime", {**picture.timings, "compress_ms": compress_ms / len(pictures)})
        width, height = pictures[0].image.size
        header: dict[str, Any] = {
            "type": "image",
            "id": form.id,
            "seed": pictures[0].seed,
            "width": width,
            "height": height,
            "format": kind,
            "timings": {name: round(value, 2) for name, value in timings.items()},
        }
        if pictures[0].notes:
            header["notes"] = list(pictures[0].notes)
        if len(files) > 1:
            header |= {"seeds": [picture.seed for picture in pictures], "lengths": [len(file) for file in files]}
        left = await server.access.left(self._visitor)
        if left is not None:
            header["left"] = left
            self._quota_short |= left < server.bounds.live_n
        header["timings"]["total_ms"] = round((time.perf_counter() - answer.came) * 1000, 2)
        return packed(header, b"".join(files))

    async def _send(self, message: str | bytes) -> None:
        sending = self._socket.send_text(message) if isinstance(message, str) else self._socket.send_bytes(message)
        try:
            await asyncio.wait_for(sending, SEND_S)
        except RuntimeError as error:  # closed already, by either side
            raise WebSocketDisconnect(1006) from error


def opened(message: str | bytes, most: int) -> tuple[Any, bytes]:
    """What a message says, and the bytes that came with it, `most` at most.

    Raises:
        ApiError: it is too large, or none.
    """
    if len(message) > (MOST_JSON if isinstance(message, str) else most):
        raise ApiError(413, "The message is too large.", "too_large")
    try:
        return (json.loads(message), b"") if isinstance(message, str) else unpacked(message)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The message is no JSON; see docs/serve.md.", "invalid_body") from error


def name_in(fields: Any) -> int | None:
    """The id of a message that may be wrong otherwise, so that its error can name it."""
    name = fields.get("id") if isinstance(fields, dict) else None
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    return name if isinstance(name, int) and not isinstance(name, bool) and 0 <= name <= LARGEST_SEED else None
