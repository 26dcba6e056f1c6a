from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest

from onestill.errors import StepsError
from onestill.pipeline import Pipeline
from onestill.serve.errors import Busy, Closing, EngineFault, Superseded, TooLate
from onestill.serve.queue.jobs import Job
from onestill.serve.queue.scheduler import Limits, Scheduler
from tests.serve.conftest import Gated

Start = Callable[..., Scheduler]
WAIT = 20


@pytest.fixture
def start(gated: Gated) -> Iterator[Start]:
    """Start schedulers over the gated engine; they are closed after the test."""
    started: list[Scheduler] = []

    def make(**limits: Any) -> Scheduler:
        started.append(Scheduler(Pipeline(gated), Limits(**limits)))
        return started[-1]

    yield make
    gated.gate.set()
    for scheduler in started:
        scheduler.close()
        assert not scheduler._thread.is_alive()


def job(prompt: str = "a red apple", seeds: tuple[int, ...] = (1,), **changes: Any) -> Job:
    return Job(**{"prompt": prompt, "seeds": seeds, "num_inference_steps": 1, "height": 32, "width": 32} | changes)


def occupy(scheduler: Scheduler, gated: Gated) -> Any:
    """Have the model draw something that does not end before the gate opens."""
    gated.hold()
    future = scheduler.submit(job("occupied"), "someone")
    gated.wait_reached()
    return future


def test_a_picture_is_what_the_pipeline_draws_alone(start: Start, tiny_pipe: Pipeline) -> None:
    pictures = start().submit(job(seeds=(7, 3, 5)), "a").result(WAIT)
    assert [picture.seed for picture in pictures] == [7, 3, 5]
    for picture in pictures:
        alone = tiny_pipe("a red apple", seed=picture.seed).images[0]
        difference = np.asarray(picture.image, np.int16) - np.asarray(alone, np.int16)
        assert np.abs(difference).max() <= 1
        assert picture.metadata["prompt"] == "a red apple"
        assert picture.metadata["seed"] == str(picture.seed)
        assert set(picture.timings) == {"queue_ms", "encode_ms", "denoise_ms", "decode_ms"}
        assert min(picture.timings.values()) >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux only")
def test_the_models_thread_lets_the_others_go_first(start: Start) -> None:
    scheduler = start()
    scheduler.submit(job(), "a").result(WAIT)
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert scheduler._thread.native_id is not None
    assert os.getpriority(os.PRIO_PROCESS, scheduler._thread.native_id) == min(19, own + 5)


def test_one_who_waits_alone_is_not_kept_for_company(start: Start) -> None:
    scheduler = start(window_ms=10_000)
    scheduler.submit(job(), "a").result(WAIT / 4)


def test_equal_shapes_of_many_clients_are_drawn_together(start: Start, gated: Gated) -> None:
    scheduler = start(batch=4)
    occupied = occupy(scheduler, gated)
    futures = [scheduler.submit(job(f"red {name}", (ord(name),)), name) for name in "abcd"]
    other = scheduler.submit(job("star", num_inference_steps=2), "e")
    gated.gate.set()
    for future in (occupied, *futures, other):
        future.result(WAIT)
    assert gated.batches == [1, 4, 1, 1]
    assert [futures[i].result()[0].metadata["prompt"] for i in range(4)] == ["red a", "red b", "red c", "red d"]


def test_pictures_started_from_images_are_not_mixed(start: Start, gated: Gated) -> None:
    scheduler = start(batch=4)
    occupied = occupy(scheduler, gated)
    red, blue = (PIL.Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    futures = [
        scheduler.submit(job(seeds=(1, 2), image=picture, strength=0.5), str(i))
        for i, picture in enumerate((red, blue))
    ]
    gated.gate.set()
    first, second = ([np.asarray(picture.image) for picture in future.result(WAIT)] for future in futures)
    occupied.result(WAIT)
    assert gated.batches[1:] == [2, 2]
    assert not np.array_equal(first[0], second[0])


def test_the_newest_wins_and_each_is_answered_once(start: Start, gated: Gated) -> None:
    scheduler = start()
    slot = scheduler.slot()
    gated.hold()
    first = slot.put(job("r"))
    gated.wait_reached()
    rest = [slot.put(job(text)) for text in ("re", "red", "red a")]
    for old in rest[:-1]:
        assert isinstance(old.exception(WAIT), Superseded)
    gated.gate.set()
    assert first.result(WAIT)[0].metadata["prompt"] == "r"  # what runs is finished
    assert rest[-1].result(WAIT)[0].metadata["prompt"] == "red a"
    assert gated.prompts == ["r", "red a"]
    assert scheduler.counts["superseded"] == 2
    assert scheduler.counts["drawn"] == 2


def test_turns_go_by_picture_so_nobody_waits_for_anothers_many(start: Start, gated: Gated) -> None:
    scheduler = start(batch=1)
    occupied = occupy(scheduler, gated)
    order: list[str] = []
    many = scheduler.submit(job("many", tuple(range(6))), "a", on_picture=lambda i, picture: order.append(f"many {i}"))
    few = scheduler.submit(job("few", (1, 2)), "b", on_picture=lambda i, picture: order.append(f"few {i}"))
    gated.gate.set()
    for future in (occupied, many, few):
        future.result(WAIT)
    assert order == ["many 0", "few 0", "many 1", "few 1", "many 2", "many 3", "many 4", "many 5"]


def test_more_steps_are_longer_turns(start: Start, gated: Gated) -> None:
    scheduler = start(batch=1)
    occupied = occupy(scheduler, gated)
    order: list[str] = []
    long = scheduler.submit(job("l", (1, 2), num_inference_steps=4), "a", on_picture=lambda *_: order.append("long"))
    short = scheduler.submit(job("s", tuple(range(8))), "b", on_picture=lambda *_: order.append("short"))
    gated.gate.set()
    for future in (occupied, long, short):
        future.result(WAIT)
    assert order[:6] == ["long", "short", "short", "short", "short", "long"]


def test_sixteen_live_connections_and_a_greedy_client_are_served_alike(start: Start) -> None:
    scheduler = start(batch=4, waiting=400, waiting_each=400)
    greedy = scheduler.submit(job("greedy", tuple(range(200))), "greedy")
    served = [0] * 16
    ended = time.monotonic() + 1.5

    def type_on(i: int) -> None:
        slot = scheduler.slot()
        while time.monotonic() < ended:
            slot.put(job(f"typist {i} {served[i]}", (i,))).result(WAIT)
            served[i] += 1
        slot.close()

    threads = [threading.Thread(target=type_on, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    greedy.cancel()
    jain = sum(served) ** 2 / (len(served) * sum(count**2 for count in served))
    assert min(served) > 0
    assert jain >= 0.95


def test_a_full_queue_says_when_to_come_again(start: Start, gated: Gated) -> None:
    scheduler = start(waiting=10, waiting_each=6)
    occupied = occupy(scheduler, gated)
    kept = [scheduler.submit(job(seeds=(1, 2, 3, 4)), name) for name in "ab"]
    with pytest.raises(Busy, match="8 pictures waiting") as full:
        scheduler.submit(job(seeds=(1, 2, 3, 4)), "c")
    assert full.value.retry_after_s is not None
    assert full.value.retry_after_s >= 1
    with pytest.raises(Busy):
        scheduler.submit(job(seeds=(1, 2, 3)), "a")  # its own share
    kept.append(scheduler.submit(job(seeds=(1, 2)), "c"))
    live = scheduler.slot().put(job("live"))  # a slot is not part of the queue
    gated.gate.set()
    for future in (occupied, *kept, live):
        future.result(WAIT)
    assert scheduler.waiting == 0


def test_many_clients_of_one_address_leave_room_for_others(start: Start, gated: Gated) -> None:
    scheduler = start(waiting=10, waiting_each=2)
    kept = [occupy(scheduler, gated)]
    kept += [scheduler.submit(job(), name, "here") for name in "abcde"]
    with pytest.raises(Busy):
        scheduler.submit(job(), "f", "here")
    kept.append(scheduler.submit(job(), "f", "there"))
    kept += [scheduler.submit(job(), f"key {i}") for i in range(4)]  # who has a key is no address
    gated.gate.set()
    for future in kept:
        future.result(WAIT)


def test_cancelled_while_waiting_is_never_drawn(start: Start, gated: Gated) -> None:
    scheduler = start(waiting=1)
    occupied = occupy(scheduler, gated)
    unwanted = scheduler.submit(job("unwanted"), "a")
    assert unwanted.cancel()
    wanted = scheduler.submit(job("wanted"), "b")  # the place is free at once
    gated.gate.set()
    for future in (occupied, wanted):
        future.result(WAIT)
    assert gated.prompts == ["occupied", "wanted"]
    assert scheduler.counts["cancelled"] == 1


def test_cancelled_while_drawn_stops_at_the_next_stage(start: Start, gated: Gated) -> None:
    scheduler = start()
    gated.hold()
    slot = scheduler.slot()
    slot.put(job("long", num_inference_steps=50))
    gated.wait_reached()
    slot.close()  # the connection is gone
    gated.gate.set()
    scheduler.submit(job("next"), "a").result(WAIT)
    assert len(gated.batches) == 2  # one of the fifty steps, and the next job


def test_one_of_a_batch_that_leaves_does_not_take_the_others_along(start: Start, gated: Gated) -> None:
    scheduler = start(batch=4)
    occupied = occupy(scheduler, gated)
    leaving, staying = (scheduler.submit(job(name, num_inference_steps=3), name) for name in ("red", "blue"))
    gated.gate.set()
    gated.gate.clear()
    leaving.cancel()
    gated.gate.set()
    occupied.result(WAIT)
    assert staying.result(WAIT)[0].metadata["prompt"] == "blue"


def test_what_waits_too_long_is_answered_not_drawn(start: Start, gated: Gated) -> None:
    scheduler = start(timeout_s=0.05)
    occupied = occupy(scheduler, gated)
    late = scheduler.submit(job("late"), "a")
    time.sleep(0.1)
    gated.gate.set()
    assert isinstance(late.exception(WAIT), TooLate)
    occupied.result(WAIT)
    assert gated.prompts == ["occupied"]


def test_an_engine_fault_is_answered_and_survived(start: Start, gated: Gated, caplog: Any) -> None:
    scheduler = start()
    gated.fail = lambda batch: RuntimeError("a kernel died")
    error = scheduler.submit(job("secret words"), "a").exception(WAIT)
    assert isinstance(error, EngineFault)
    assert "kernel" not in str(error)  # what broke inside is for the log, and prompts are not even for that
    assert "a kernel died" in caplog.text
    assert "secret" not in caplog.text
    gated.fail = lambda batch: None
    assert scheduler.submit(job(), "a").result(WAIT)
    assert scheduler.why_not_ready() is None


def test_a_fault_of_one_in_a_batch_is_not_anothers(start: Start, gated: Gated) -> None:
    scheduler = start(batch=4)
    occupied = occupy(scheduler, gated)
    futures = [scheduler.submit(job(name), name) for name in ("red", "blue", "green")]
    gated.fail = lambda batch: RuntimeError("too wide") if batch > 1 else None
    gated.gate.set()
    for future in (occupied, *futures):
        assert future.result(WAIT)
    assert gated.batches == [1, 3, 1, 1, 1]


def test_a_mistake_that_only_the_pipeline_sees_is_told(start: Start) -> None:
    scheduler = start()
    error = scheduler.submit(job(num_inference_steps=51), "a").exception(WAIT)
    assert isinstance(error, StepsError)
    assert scheduler.counts["faults"] == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate")])
def test_out_of_memory_halves_the_batch_and_later_grows_it(
    start: Start, gated: Gated, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = start(batch=4)
    occupied = occupy(scheduler, gated)
    futures = [scheduler.submit(job(name), name) for name in "abcd"]
    gated.fail = lambda batch: error if batch > 2 else None
    gated.gate.set()
    for future in (occupied, *futures):
        assert future.result(WAIT)
    assert scheduler.batch == 2
    monkeypatch.setattr("onestill.serve.queue.scheduler.GOOD_TO_GROW", 6)
    for _ in range(6):
        scheduler.submit(job(), "a").result(WAIT)
    assert scheduler.batch == 4


def test_numbers_that_are_not_finite_are_no_picture(start: Start, gated: Gated, monkeypatch: Any) -> None:
    scheduler = start()
    denoise = gated.denoise
    monkeypatch.setattr(gated, "denoise", lambda *inputs: denoise(*inputs) * np.float32("nan"))
    assert isinstance(scheduler.submit(job(), "a").exception(WAIT), EngineFault)
    assert scheduler.counts["faults"] == 1


def test_an_engine_that_keeps_failing_is_given_a_rest(start: Start, gated: Gated) -> None:
    scheduler = start()
    gated.fail = lambda batch: RuntimeError("gone")
    for _ in range(3):
        assert isinstance(scheduler.submit(job(), "a").exception(WAIT), EngineFault)
    assert scheduler.why_not_ready() == "the engine fails"
    with pytest.raises(EngineFault, match="at present") as refused:
        scheduler.submit(job(), "a")
    assert refused.value.retry_after_s is not None
    gated.fail = lambda batch: None
    time.sleep(1.1)
    assert scheduler.submit(job(), "a").result(WAIT)
    assert scheduler.why_not_ready() is None


def test_an_engine_that_hangs_is_not_ready(start: Start, gated: Gated) -> None:
    scheduler = start(stuck_s=0.05)
    occupied = occupy(scheduler, gated)
    time.sleep(0.1)
    assert scheduler.why_not_ready() == "the engine does not answer"
    gated.gate.set()
    occupied.result(WAIT)


def test_closing_finishes_what_was_accepted(start: Start, gated: Gated) -> None:
    scheduler = start()
    occupied = occupy(scheduler, gated)
    waiting = scheduler.submit(job(seeds=(1, 2, 3)), "a")
    closer = threading.Thread(target=scheduler.close, args=(WAIT,))
    closer.start()
    while scheduler.why_not_ready() != "closing":
        time.sleep(0.005)
    with pytest.raises(Closing):
        scheduler.submit(job(), "b")
    with pytest.raises(Closing):
        scheduler.slot().put(job())
    gated.gate.set()
    closer.join(WAIT)
    assert occupied.result(0)
    assert len(waiting.result(0)) == 3


def test_closing_answers_what_it_has_no_time_for(start: Start, gated: Gated) -> None:
    scheduler = start()
    occupied = occupy(scheduler, gated)
    waiting = scheduler.submit(job(), "a")
    closer = threading.Thread(target=scheduler.close, args=(0.05,))
    closer.start()
    assert isinstance(waiting.exception(WAIT), Closing)
    assert isinstance(occupied.exception(WAIT), Closing)
    gated.gate.set()
    closer.join(WAIT)


def test_a_listener_that_fails_harms_nobody(start: Start) -> None:
    def broken(index: int, picture: Any) -> None:
        raise ValueError("gone")

    scheduler = start()
    assert scheduler.submit(job(), "a", on_picture=broken).result(WAIT)
    assert scheduler.submit(job(), "a").result(WAIT)
