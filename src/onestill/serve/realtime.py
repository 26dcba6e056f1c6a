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

from onestill.errors import OnestillError
from onestill.serve.access import Visitor
from onestill.serve.envelope import ApiError, error_object, from_validation, to_api_error
from onestill.serve.jobs import Job, Picture, Superseded
from onestill.serve.pace import Bucket
from onestill.serve.requests import KINDS, LARGEST_SEED, Live, job_of, read_upload
from onestill.serve.state import Server

__all__ = ["converse", "name_in", "packed", "unpacked"]

PROTOCOL = "onestill.v1"
KEY_PROTOCOL = "onestill.key."
UNANSWERED = 32  # messages whose answers are not sent yet; beyond that no more are read
MOST_JSON = 64 * 1024  # of a message: the longest prompt fits, and reading it holds nobody up
SEND_S = 20.0  # a client that takes nothing for so long is cut off
DEFAULT_QUALITY = 85


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
    address = socket.client.host if socket.client else ""
    connection: _Connection | None = None
    try:
        if server.live.total() >= server.bounds.live or server.live[address] >= server.bounds.live_each:
            raise ApiError(429, "Too many live connections; close one.", "too_many_connections", retry_after_s=5)
        visitor = await server.access.identify(socket, key)
        connection = _Connection(server, socket, visitor)
    except ApiError as error:
        with suppress(WebSocketDisconnect, RuntimeError):
            await socket.send_text(json.dumps({"type": "error", "id": None, "error": error_object(error)}))
            await socket.close(1008 if error.status == 401 else 1013)
        return
    server.live[address] += 1
    try:
        await connection.run()
    finally:
        server.live[address] -= 1
        if not server.live[address]:
            del server.live[address]


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

    def __init__(self, server: Server, socket: WebSocket, visitor: Visitor) -> None:
        self._server = server
        self._socket = socket
        self._visitor = visitor
        self._slot = server.scheduler.slot()
        self._answers: asyncio.Queue[_Answer | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(UNANSWERED)
        each_s = server.bounds.messages_each_s
        self._rate = Bucket(each_s, 2 * each_s)
        self._quota_used = False

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
                    await asyncio.wait_for(self._socket.close(1011), 1)
        for result in results:
            expected = (asyncio.CancelledError, WebSocketDisconnect, TimeoutError, RuntimeError)
            if isinstance(result, BaseException) and not isinstance(result, expected):
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
            self._check_rate()
            fields, image = self._opened(text, data)
            if isinstance(fields, dict):
                name = name_in(fields)
            form = self._server.forms.live.model_validate(fields)
            await self._server.check_prompt(form.prompt)
            if self._quota_used:  # it may be another day by now
                await self._server.access.check(self._visitor, form.n or 1)
                self._quota_used = False
            picture = (
                await self._server.in_pool(read_upload, image, form, self._server.info, self._server.bounds.upload_px)
                if image
                else None
            )
            self._queue(form, job_of(form, self._server.info, picture), came)
        except ValidationError as error:
            refusal = from_validation(error, self._server.forms.live.model_fields)
            self._answers.put_nowait(_Answer(name, refusal, None, came))
        except OnestillError as error:
            self._answers.put_nowait(_Answer(name, to_api_error(error), None, came))

    def _check_rate(self) -> None:
        if not self._rate.take():
            each_s = self._server.bounds.messages_each_s
            raise ApiError(429, f"Send at most {each_s:g} messages a second.", "rate_limit", retry_after_s=1)

    def _opened(self, text: str | None, data: bytes | None) -> tuple[Any, bytes]:
        most = self._server.bounds.message if text is None else MOST_JSON
        if len(text or data or "") > most:
            raise ApiError(413, "The message is too large.", "too_large")
        try:
            return (json.loads(text), b"") if text is not None else unpacked(data or b"")
        except (ValueError, RecursionError) as error:
            raise ApiError(400, "The message is no JSON; see docs/serve.md.", "invalid_body") from error

    def _queue(self, form: Live, job: Job, came: float) -> None:
        loop = asyncio.get_running_loop()
        future = self._slot.put(job)

        def done(future: Future[list[Picture]]) -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(self._answers.put_nowait, _Answer(form.id, future, form, came))

        future.add_done_callback(done)

    # --- down -------------------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        while (answer := await self._answers.get()) is not None:
            name, result, form, came = answer
            try:
                if isinstance(result, ApiError) or form is None:
                    raise result if isinstance(result, ApiError) else RuntimeError
                await self._send(await self._picture(form, result.result(), came))
                self._server.metrics.count("onestill_live_answers_total", answer="image")
            except Superseded:
                await self._send(json.dumps({"type": "superseded", "id": name}))
                self._server.metrics.count("onestill_live_answers_total", answer="superseded")
            except CancelledError:
                return  # the slot was closed: the connection is over
            except OnestillError as error:
                refusal = to_api_error(error)
                self._quota_used |= refusal.code == "insufficient_quota"
                told: dict[str, Any] = {"type": "error", "id": name, "error": error_object(refusal)}
                if refusal.retry_after_s is not None:
                    told["retry_after_s"] = round(refusal.retry_after_s, 1)
                await self._send(json.dumps(told))
                self._server.metrics.count("onestill_live_answers_total", answer="error")
            self._room.release()

    async def _picture(self, form: Live, pictures: list[Picture], came: float) -> bytes:
        server = self._server
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
        header["timings"]["total_ms"] = round((time.perf_counter() - came) * 1000, 2)
        return packed(header, b"".join(files))

    async def _send(self, message: str | bytes) -> None:
        sending = self._socket.send_text(message) if isinstance(message, str) else self._socket.send_bytes(message)
        await asyncio.wait_for(sending, SEND_S)


def name_in(fields: Mapping[str, Any]) -> int | None:
    """The id of a message that may be wrong otherwise, so that its error can name it."""
    name = fields.get("id")
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    return name if isinstance(name, int) and not isinstance(name, bool) and 0 <= name <= LARGEST_SEED else None
