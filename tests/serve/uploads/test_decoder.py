from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import PIL.Image
import pytest

from onestill.pipeline.picture import fitted
from onestill.serve.errors import ApiError, Busy
from onestill.serve.uploads import decoder as module
from onestill.serve.uploads.decoder import Decoder, Room
from onestill.serve.uploads.worker import DONE, TOO_COSTLY
from tests.serve.pictures import png, scan_bomb, slow_jpeg

MOST = 16_000_000


def run(use: Callable[[Decoder], Awaitable[None]], workers: int = 1) -> None:
    async def main() -> None:
        decoder = Decoder(workers)
        try:
            await use(decoder)
        finally:
            await asyncio.to_thread(decoder.close)

    asyncio.run(main())


async def code_of(call: Awaitable[Any]) -> str:
    try:
        await call
    except ApiError as error:
        return error.code
    return "decoded"


def test_a_picture_comes_back_as_the_pipeline_would_fit_it() -> None:
    async def use(decoder: Decoder) -> None:
        for _ in range(2):  # a process that is started, and one that has answered before
            found = await decoder.read("a", png((300, 200), "blue"), 32, 48, MOST)
            assert (found.size, found.mode) == ((48, 32), "RGB")
            with PIL.Image.open(io.BytesIO(png((300, 200), "blue"))) as picture:
                assert found.tobytes() == fitted(picture, 32, 48).tobytes()
        assert await code_of(decoder.read("a", png()[:-40], 32, 32, MOST)) == "invalid_image"
        assert await code_of(decoder.read("a", png((200, 200)), 32, 32, 39_999)) == "image_too_large"
        assert await code_of(decoder.read("a", png(), 32, 32, MOST)) == "decoded"

    run(use)


@pytest.mark.parametrize("how", ["time", "cancelled"])
def test_a_file_that_takes_long_is_stopped_and_the_next_is_decoded(how: str, monkeypatch: Any) -> None:
    """Whatever a decoder does with a file, the process that does it ends, and nobody else waits for it."""

    async def use(decoder: Decoder) -> None:
        await decoder.read("a", png(), 32, 32, MOST)
        process = decoder._workers[0]._process
        assert process is not None
        if how == "time":
            monkeypatch.setattr(module, "DECODE_S", 0.2)
        reading = asyncio.create_task(code_of(decoder.read("a", slow_jpeg(), 32, 32, MOST)))
        await asyncio.sleep(0.1)
        if how == "time":
            assert await reading == "image_too_costly"
        else:
            reading.cancel()
        monkeypatch.undo()
        assert await code_of(decoder.read("b", png(), 32, 32, MOST)) == "decoded"
        assert process.poll() is not None

    run(use)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limits, or fewer")
def test_the_system_bounds_what_one_file_takes() -> None:
    """Processor time ends the process, and memory is refused to it."""

    def ended(limits: str, data: bytes, times: int = 1) -> subprocess.CompletedProcess[bytes]:
        program = f"""
import sys
from onestill.serve.uploads import worker
data = sys.stdin.buffer.read()
{limits}
print(*{{worker.decoded(data, 32, 32, {MOST})[0] for _ in range({times})}})
"""
        return subprocess.run([sys.executable, "-c", program], input=data, stdout=subprocess.PIPE)

    slow = ended("worker.CPU_S = 0; worker._limit(2**30)", slow_jpeg(), times=9)
    assert (slow.returncode, slow.stdout) == (-signal.SIGXCPU, b"")
    large = png((2500, 2500))
    assert ended("worker._limit(2**30)", large).stdout == b"%d\n" % DONE
    assert ended("worker._limit(2**25)", large).stdout == b"%d\n" % TOO_COSTLY


def test_visitors_take_turns_and_each_has_one_at_a_time() -> None:
    order: list[str] = []

    async def use(decoder: Decoder) -> None:
        async def read(who: str) -> None:
            await decoder.read(who, png(), 32, 32, MOST)
            order.append(who)

        await asyncio.gather(*(read(who) for who in "aaaabbc"))

    run(use)
    assert order == list("abcabaa")


def test_one_visitor_never_has_two_processes() -> None:
    async def use(decoder: Decoder) -> None:
        started = [asyncio.create_task(code_of(decoder.read("a", png(), 32, 32, MOST))) for _ in range(4)]
        await asyncio.sleep(0)
        assert len(decoder._idle) == 1
        assert await decoder.read("b", png(), 32, 32, MOST)
        assert await asyncio.gather(*started) == ["decoded"] * 4
        assert len(decoder._idle) == 2

    run(use, workers=2)


def test_those_who_left_while_they_waited_take_no_turn() -> None:
    async def use(decoder: Decoder) -> None:
        tasks = [asyncio.create_task(decoder.read(who, png(), 32, 32, MOST)) for who in "abbc"]
        await asyncio.sleep(0)
        for task in tasks[1:3]:
            task.cancel()
        assert (await tasks[3]).size == (32, 32)
        assert decoder._waiting == {}
        full = [asyncio.create_task(code_of(decoder.read("d", png(), 32, 32, MOST))) for _ in range(40)]
        codes = await asyncio.gather(*full)
        assert sorted(set(codes)) == ["decoded", "queue_full"]
        assert codes.count("decoded") == 1 + module.WAITING_EACH

    run(use)


def test_who_sent_a_costly_file_waits_and_others_do_not() -> None:
    async def use(decoder: Decoder) -> None:
        assert await code_of(decoder.read("a", scan_bomb(), 32, 32, MOST)) == "image_too_costly"
        started = time.monotonic()
        mine = asyncio.create_task(code_of(decoder.read("a", png(), 32, 32, MOST)))
        assert await code_of(decoder.read("b", png(), 32, 32, MOST)) == "decoded"
        assert not mine.done()
        assert await mine == "decoded"
        assert time.monotonic() - started > 0.9 * module.COSTLY_S

    run(use)


def test_a_process_that_does_not_start_is_the_servers_fault(monkeypatch: Any) -> None:
    async def use(decoder: Decoder) -> None:
        monkeypatch.setattr(module.sys, "executable", "/bin/false" if os.name != "nt" else "where.exe")
        with pytest.raises(RuntimeError, match="did not start"):
            await decoder.read("a", png(), 32, 32, MOST)
        monkeypatch.undo()
        assert await code_of(decoder.read("a", png(), 32, 32, MOST)) == "decoded"

    run(use)


def test_closing_ends_what_is_decoded() -> None:
    decoder = Decoder(1)

    async def main() -> str:
        reading = asyncio.create_task(code_of(decoder.read("a", slow_jpeg(), 32, 32, MOST)))
        waiting = asyncio.create_task(code_of(decoder.read("b", png(), 32, 32, MOST)))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(decoder.refuse)
        assert await waiting == await code_of(decoder.read("b", png(), 32, 32, MOST)) == "closing"
        assert not reading.done()
        await asyncio.to_thread(decoder.close)
        return await reading

    started = time.monotonic()
    assert asyncio.run(main()) == "closing"
    assert time.monotonic() - started < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("onestill-uploads")]


def test_the_room_for_uploads_is_bounded_and_shared() -> None:
    room = Room(100, 30)
    with room.share("a") as first, room.share("a") as second, room.share("b") as other:
        first(20)
        second(10)
        with pytest.raises(Busy):
            second(1)
        other(30)
        with room.share("c") as third, room.share("d") as last:
            third(30)
            last(10)
            with pytest.raises(Busy):
                last(1)
        other(0)
    with room.share("a") as again:
        again(30)
