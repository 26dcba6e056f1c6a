"""Uploads in the server's process: how many bytes of them it holds, whose turn it is, and what came of each.

A stranger's file is decoded in a process of its own; see `worker`. Only threads of this module wait for it, so a file
that takes long delays no drawing and no other request.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple

import PIL.Image
from PIL.Image import Image

from onestill.serve.errors import ApiError, Busy, Closing
from onestill.serve.uploads.worker import ANSWER, ASK, DONE, INVALID, OTHER_SIZE, READY, TOO_COSTLY, TOO_LARGE

__all__ = ["Decoder", "Room"]

DECODE_S = 15.0  # for one file, also where the machine is busy; `worker.CPU_S` is the limit of its own time
COSTLY_S = 1.0  # after a file that was refused for its cost, the next one of its visitor waits for so long
DEAR_S = 0.1  # and after one that took more than that, for as long as it took
WAITING_EACH = 32  # files of one visitor that may wait; as many as unanswered messages of a live connection
SHARE = 4  # one visitor may hold this part of the room
KEPT = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
    "TEMP",
    "TMP",
    "TMPDIR",
)


class Room:
    """The bytes of uploads that are received, or wait to be decoded.

    Args:
        most: bytes in all.
        largest: bytes of one request, which a visitor may always hold.
    """

    def __init__(self, most: int, largest: int) -> None:
        self._most, self._each = most, max(largest, most // SHARE)
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Bytes that are held."""
        return self._held.total()

    @contextmanager
    def share(self, who: str) -> Iterator[Callable[[int], None]]:
        """A call that takes room for so many bytes, and raises Busy where there is none. The end gives all back."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if self._held[who] + size > self._each or self.held + size > self._most:
                raise Busy("Too many uploads are under way; try again in a moment.", 2)
            taken += size
            self._held[who] += size

        try:
            yield take
        finally:
            self._held[who] -= taken
            if not self._held[who]:
                del self._held[who]


class Decoder:
    """Decodes uploads in a few processes, one at a time for each visitor, and visitors in turn. Close it when done.

    All methods are for the thread of one event loop. The processes start with the first upload.

    Args:
        workers: how many processes; None is one for every two processors, and four at most.
    """

    def __init__(self, workers: int | None = None) -> None:
        count = workers or min(4, max(1, (os.cpu_count() or 1) // 2))
        self._workers = [_Worker() for _ in range(count)]
        self._idle = list(self._workers)
        self._busy: set[str] = set()  # visitors, one of whose files is decoded
        self._waiting: dict[str, deque[asyncio.Future[_Worker]]] = {}  # the next visitor first
        self._threads = ThreadPoolExecutor(count, "onestill-uploads")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False

    async def read(self, who: str, data: bytes, height: int, width: int, most_px: int, masked: bytes = b"") -> Image:
        """The picture in an upload, fitted to the size of its request. Cancelling the call ends its decoding.

        Args:
            who: the visitor.
            data: the file: PNG, JPEG or WebP.
            height, width: pixels of the result.
            most_px: pixels that the file may have.
            masked: the file of the image whose mask it is, so that the result is white where to draw; none where it is
                no mask.

        Raises:
            ApiError: 400, the file has another format, is damaged, or costs too much to decode.
            Busy: too many files of this visitor wait.
            Closing: the server is shutting down.
        """
        self._check_open()
        self._loop = asyncio.get_running_loop()
        worker = await self._turn(who)
        worker.stopped.clear()
        asked = asyncio.wrap_future(self._threads.submit(worker.ask, data, height, width, most_px, masked))
        asked.add_done_callback(lambda done: self._release(who, worker, done))
        try:
            answer = await asyncio.wait_for(asyncio.shield(asked), DECODE_S)
        except TimeoutError:
            worker.stop()
            answer = _GONE
        except asyncio.CancelledError:
            worker.stop()
            raise
        if answer.outcome == DONE:
            return PIL.Image.frombytes("L" if masked else "RGB", (width, height), answer.pixels)
        self._check_open()
        raise _refusal(answer.outcome, most_px, "mask" if masked else "image")

    def refuse(self) -> None:
        """Refuse what waits and all that comes from now on; any thread may call it. What is decoded goes on."""
        self._closing = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(self._refuse_waiting)

    def close(self) -> None:
        """End the processes. Any thread may call it."""
        self._closing = True
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.end()

    def _check_open(self) -> None:
        if self._closing:
            raise _closing()

    async def _turn(self, who: str) -> _Worker:
        if self._idle and who not in self._busy:
            self._busy.add(who)
            return self._idle.pop()
        mine = self._waiting.setdefault(who, deque())
        if len(mine) >= WAITING_EACH:
            raise Busy("Too many of your uploads wait; try again in a moment.", 2)
        turn: asyncio.Future[_Worker] = asyncio.get_running_loop().create_future()
        mine.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._idle.append(turn.result())
                self._next(who)
            raise

    def _release(self, who: str, worker: _Worker, done: asyncio.Future[_Answer]) -> None:
        self._idle.append(worker)
        answer = _GONE if done.cancelled() or done.exception() else done.result()
        pause_s = COSTLY_S if answer.outcome == TOO_COSTLY else 0.0
        if answer.took_s > DEAR_S:
            pause_s += answer.took_s
        if who in self._waiting:
            self._waiting[who] = self._waiting.pop(who)  # behind the others
        if pause_s:
            asyncio.get_running_loop().call_later(pause_s, self._next, who)
            self._next(None)
        else:
            self._next(who)

    def _refuse_waiting(self) -> None:
        for queue in self._waiting.values():
            for turn in queue:
                if not turn.done():
                    turn.set_exception(_closing())
        self._waiting.clear()

    def _next(self, who: str | None) -> None:
        """Give idle processes to those who wait; `who` may have another."""
        if who is not None:
            self._busy.discard(who)
        for name in list(self._waiting):
            if name in self._busy or not self._idle:
                continue
            mine = self._waiting[name]
            while mine and mine[0].done():  # cancelled
                mine.popleft()
            if mine:
                self._busy.add(name)
                mine.popleft().set_result(self._idle.pop())
            if not mine:
                del self._waiting[name]


def _refusal(outcome: int, most_px: int, name: str) -> ApiError:
    code, message = "image_too_costly", f"The {name} costs too much to decode; save it again as a plain PNG or JPEG."
    if outcome == TOO_LARGE:
        code = "image_too_large"
        message = f"The {name} has too many pixels; give one of at most {most_px / 1e6:.0f} megapixels, not a strip."
    elif outcome == INVALID:
        code, message = "invalid_image", f"The {name} cannot be read; give a PNG, JPEG or WebP file."
    elif outcome == OTHER_SIZE:
        code, message = "invalid_image", "The mask has another size than the image; give both the same size."
    return ApiError(400, message, code, param=name)


def _closing() -> Closing:
    return Closing("The server is closing; try again in a moment.", 5)


class _Answer(NamedTuple):
    """What became of a file, how much processor time it took, in seconds, and its pixels where it is DONE."""

    outcome: int
    took_s: float
    pixels: bytes = b""


_GONE = _Answer(TOO_COSTLY, 0.0)  # of a process that ended before it answered


class _Worker:
    """One process, which is started when it is needed. `ask` and `end` are called in one thread at a time."""

    def __init__(self) -> None:
        self.stopped = threading.Event()  # whether the file that is asked for is not wanted any more
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, data: bytes, height: int, width: int, most_px: int, masked: bytes) -> _Answer:
        """What became of a file."""
        process = self._started()
        if process is None:
            return _GONE
        assert process.stdin is not None
        assert process.stdout is not None
        size = height * width * (1 if masked else 3)
        with suppress(OSError):  # the process ended
            process.stdin.write(ASK.pack(len(data), len(masked), most_px, height, width))
            process.stdin.write(data)
            process.stdin.write(masked)
            process.stdin.flush()
            head = process.stdout.read(ANSWER.size)
            if len(head) == ANSWER.size:
                outcome, took_s = ANSWER.unpack(head)
                pixels = process.stdout.read(size) if outcome == DONE else b""
                if outcome != DONE or len(pixels) == size:
                    return _Answer(outcome, took_s, pixels)
        self.end()
        return _GONE

    def stop(self) -> None:
        """End the process, in the midst of its work. Any thread may call it."""
        with self._lock:
            self.stopped.set()
            if self._process is not None:
                self._process.kill()

    def end(self) -> None:
        """End the process, and wait until it has ended."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not written yet cannot be
                    pipe.close()

    def _started(self) -> subprocess.Popen[bytes] | None:
        """The process, None where it is not wanted any more. Raises RuntimeError where it does not start."""
        with self._lock:
            if self.stopped.is_set():
                return None
            if self._process is None:
                # Nothing else of the environment, which may hold the database's password, is a decoder's business.
                few = {name: os.environ[name] for name in KEPT if name in os.environ}
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "onestill.serve.uploads.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=few | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
                is_new = True
            else:
                is_new = False
            process = self._process
        if is_new and (process.stdout is None or process.stdout.read(ANSWER.size) != ANSWER.pack(READY, 0)):
            self.end()
            if self.stopped.is_set():
                return None
            raise RuntimeError("the process that decodes uploads did not start")
        return process
