"""`WS /v1/realtime`: pictures while someone types. Every message gets exactly one answer.

The client sends JSON text, or a binary message with a picture to start from. The server sends `ready`, then for each
message a binary one with pictures, or text `superseded` or `error`. `messages` has the form of binary messages.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from onestill.serve.access.quota import Visitor, network
from onestill.serve.access.rate_limit import TokenBucket
from onestill.serve.connections import share_of
from onestill.serve.errors import ApiError, Superseded
from onestill.serve.queue.jobs import Picture
from onestill.serve.web.errors import error_object, from_validation, to_api_error
from onestill.serve.web.messages import id_in, pack, read_message
from onestill.serve.web.requests import Live
from onestill.serve.web.server import Drawing, Server

__all__ = ["converse"]

PROTOCOL = "onestill.v1"
KEY_PROTOCOL = "onestill.key."
UNANSWERED = 32  # messages without an answer; with more the server stops reading
SEND_S = 20.0  # a client that reads nothing for so long is cut off
REFUSED, FAILED, TRY_LATER = 1008, 1011, 1013  # WebSocket close codes


async def converse(server: Server, socket: WebSocket) -> None:
    """Serve one live connection until either side ends it."""
    offered = [name.strip() for name in socket.headers.get("sec-websocket-protocol", "").split(",")]
    # A browser cannot set headers on a socket; a key in the address would end up in logs.
    key = next((_key_in(name) for name in offered if name.startswith(KEY_PROTOCOL)), None)
    await socket.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
    address = network(socket.client.host if socket.client else "")
    if server.live[address] >= share_of(server.bounds.live_each, server.bounds.live, server.live.total()):
        await _refuse(socket, ApiError(429, "Too many live connections; close one.", "too_many_connections"))
        return
    server.live[address] += 1
    try:
        try:
            visitor = await server.access.identify(socket, key)
        except Exception as error:
            await _refuse(socket, to_api_error(error))
            return
        with suppress(WebSocketDisconnect, TimeoutError):  # the client left, or reads nothing
            await _Connection(server, socket, key, visitor).run()
    finally:
        server.live[address] -= 1
        if not server.live[address]:
            del server.live[address]


async def _refuse(socket: WebSocket, error: ApiError) -> None:
    """Send why the connection is refused, and close it."""
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
    """The result of the message `id`: its drawing, or why it was refused."""

    id: int | None
    result: Drawing[Live] | ApiError
    came: float  # by time.perf_counter


class _Connection:
    """A reader and a sender, with a queue of answers between them in the order in which they are known."""

    def __init__(self, server: Server, socket: WebSocket, key: str | None, visitor: Visitor) -> None:
        self._server = server
        self._socket = socket
        self._key = key
        self._slot = server.scheduler.slot(visitor.name, visitor.address)
        self._answers: asyncio.Queue[_Answer] = asyncio.Queue()
        self._none_waits = asyncio.Event()  # whether no answer is known that the sender has not begun with
        self._none_waits.set()
        self._room = asyncio.Semaphore(UNANSWERED)
        each_s = server.bounds.messages_each_s
        self._rate = TokenBucket(each_s, 2 * each_s)
        self._quota_short = True  # whether a message may ask for more than is left; then the quota is checked first
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
                "prompt": bounds.live_prompt,
                "n": bounds.live_n,
                "num_inference_steps": bounds.steps,
                "sizes": [f"{width}x{height}" for height, width in info.sizes],
                "message_bytes": bounds.message,
                "messages_per_second": bounds.messages_each_s,
            },
        }

    # --- up ---------------------------------------------------------------------------------------------------------

    async def _read_all(self) -> None:
        message = await self._socket.receive()
        while message["type"] != "websocket.disconnect":
            came = time.perf_counter()
            await self._room.acquire()
            await self._none_waits.wait()  # who does not read the answers cannot make the server hold many pictures
            text, data = message.get("text"), message.get("bytes")
            if data is None:
                await self._take(text, data, came)
                message = await self._socket.receive()
            else:
                message = await self._receive_while(self._take(text, data, came))

    async def _receive_while(self, taking: Coroutine[Any, Any, None]) -> Message:
        """The next message, after `taking` has ended, which is cancelled where the client disconnects first."""
        take, following = asyncio.ensure_future(taking), asyncio.ensure_future(self._socket.receive())
        try:
            await asyncio.wait({take, following}, return_when=asyncio.FIRST_COMPLETED)
            if not take.done() and following.result()["type"] == "websocket.disconnect":
                take.cancel()
                return following.result()
            await take
            return await following
        except BaseException:
            take.cancel()
            following.cancel()
            raise

    async def _take(self, text: str | None, data: bytes | None, came: float) -> None:
        message_id: int | None = None
        loop = asyncio.get_running_loop()
        try:
            in_time = self._rate.take()
            fields, upload = read_message(data or b"" if text is None else text, self._server.bounds.message)
            message_id = id_in(fields)
            if not in_time:
                each_s = self._server.bounds.messages_each_s
                raise ApiError(429, f"Send at most {each_s:g} messages a second.", "rate_limit", retry_after_s=1)
            # Checked for each message: keys may be revoked meanwhile.
            visitor = await self._server.access.identify(self._socket, self._key)
            form = self._server.forms.live.model_validate(fields)
            drawing = await self._draw(visitor, form, upload or None)
        except ValidationError as error:
            refusal = from_validation(error, self._server.forms.live.model_fields)
            self._put(_Answer(message_id, refusal, came))
        except Exception as error:
            self._put(_Answer(message_id, to_api_error(error), came))
        else:
            answer = _Answer(message_id, drawing, came)

            def done(future: Future[list[Picture]]) -> None:
                with suppress(RuntimeError):  # the loop has closed
                    loop.call_soon_threadsafe(self._put, answer)

            drawing.future.add_done_callback(done)

    def _put(self, answer: _Answer) -> None:
        self._answers.put_nowait(answer)
        self._none_waits.clear()

    async def _draw(self, visitor: Visitor, form: Live, upload: bytes | None) -> Drawing[Live]:
        check_quota, self._quota_short = self._quota_short, False  # an answer on its way may set it again
        server = self._server
        try:
            with server.uploads.share(visitor.source) as take:
                take(len(upload or b""))
                return await server.draw(visitor, form, upload, slot=self._slot, check_quota=check_quota)
        except Exception:
            self._quota_short |= check_quota
            raise

    # --- down -------------------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        while self._close_code != REFUSED:
            answer = await self._answers.get()
            if self._answers.empty():
                self._none_waits.set()
            message: str | bytes
            try:
                kind, message = "image", await self._picture(answer)
            except Superseded:
                kind, message = "superseded", json.dumps({"type": "superseded", "id": answer.id})
            except CancelledError:
                return  # the slot was closed, as the connection has ended
            except Exception as error:
                kind, message = "error", self._error(answer.id, to_api_error(error))
            await self._send(message)
            self._server.metrics.count("onestill_live_answers_total", answer=kind)
            self._room.release()

    def _error(self, message_id: int | None, refusal: ApiError) -> str:
        self._quota_short |= refusal.code == "insufficient_quota"
        if refusal.status == 401:
            self._close_code = REFUSED
        message: dict[str, Any] = {"type": "error", "id": message_id, "error": error_object(refusal)}
        if refusal.retry_after_s is not None:
            message["retry_after_s"] = round(refusal.retry_after_s, 1)
        return json.dumps(message)

    async def _picture(self, answer: _Answer) -> bytes:
        server, drawing = self._server, answer.result
        if isinstance(drawing, ApiError):
            raise drawing
        files = await drawing.files(drawing.future.result())
        for file in files:
            server.count_picture("realtime", {**file.picture.timings, "compress_ms": file.compress_ms})
        first, last = files[0].picture, files[-1].picture
        timings = {**last.timings, "compress_ms": sum(file.compress_ms for file in files)}
        width, height = first.image.size
        header: dict[str, Any] = {
            "type": "image",
            "id": answer.id,
            "seed": first.seed,
            "width": width,
            "height": height,
            "format": drawing.form.encoding.kind.lower(),
            "timings": {name: round(value, 2) for name, value in timings.items()},
        }
        if first.notes:
            header["notes"] = list(first.notes)
        if len(files) > 1:
            header |= {"seeds": [file.picture.seed for file in files], "lengths": [len(file.data) for file in files]}
        left = await server.access.left(drawing.visitor)
        if left is not None:
            header["left"] = left
            self._quota_short |= left < server.bounds.live_n
        header["timings"]["total_ms"] = round((time.perf_counter() - answer.came) * 1000, 2)
        return pack(header, b"".join(file.data for file in files))

    async def _send(self, message: str | bytes) -> None:
        sending = self._socket.send_text(message) if isinstance(message, str) else self._socket.send_bytes(message)
        try:
            await asyncio.wait_for(sending, SEND_S)
        except RuntimeError as error:  # closed already, by either side
            raise WebSocketDisconnect(1006) from error
