"""Engines that die, hang or lie: each request is answered, and the model draws again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest

from onestill.pipeline import Pipeline
from onestill.serve.errors import EngineFault, TooLate
from onestill.serve.queue.jobs import Job
from onestill.serve.queue.scheduler import Limits, Scheduler
from tests.serve.conftest import Gated

Start = Callable[..., Scheduler]
WAIT = 20


class PanicException(BaseException):
    """What an engine in Rust raises."""


@pytest.fixture
def start(gated: Gated) -> Iterator[Start]:
    started: list[Scheduler] = []

    def make(load: Callable[[], Pipeline] | None = None, **limits: Any) -> Scheduler:
        started.append(Scheduler(Pipeline(gated), Limits(**limits), load))
        return started[-1]

    yield make
    gated.gate.set()
    for scheduler in started:
        scheduler.close()


def job(prompt: str = "a red apple", seeds: tuple[int, ...] = (1,), **changes: Any) -> Job:
    return Job(**{"prompt": prompt, "seeds": seeds, "num_inference_steps": 1, "height": 32, "width": 32} | changes)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), PanicException("unwrap"), MemoryError()])
def test_whatever_a_call_raises_is_answered_and_the_thread_goes_on(
    start: Start, gated: Gated, error: BaseException
) -> None:
    scheduler = start()
    gated.fail = lambda batch: error
    assert isinstance(scheduler.submit(job(), "a").exception(WAIT), EngineFault)
    gated.fail = lambda batch: None
    assert scheduler.submit(job(), "a").result(WAIT)
    assert scheduler.why_dead() is None


@pytest.mark.parametrize("lie", ["too few", "too many", "wrong size", "wrong mode", "no pictures", "other seeds"])
def test_an_output_of_another_form_is_no_picture(
    start: Start, monkeypatch: pytest.MonkeyPatch, lie: str, caplog: Any
) -> None:
    honest = Pipeline.__call__

    def call(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        output = honest(self, *arguments, **options)
        image = output.images[0]
        lies: dict[str, list[Any]] = {
            "too few": output.images[1:],
            "too many": [*output.images, image],
            "wrong size": [image.resize((16, 32)) for image in output.images],
            "wrong mode": [image.convert("L") for image in output.images],
            "no pictures": [np.asarray(image) for image in output.images],
        }
        if lie in lies:
            output.images[:] = lies[lie]
        else:
            output.seeds[0] += 1
        return output

    scheduler = start()
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "__call__", call)
        for seeds in ((1,), (1, 2)):
            assert isinstance(scheduler.submit(job(seeds=seeds), "a").exception(WAIT), EngineFault)
    assert "The engine" in caplog.text
    assert scheduler.submit(job(), "a").result(WAIT)


def test_pictures_that_are_no_bytes_are_no_pictures(start: Start, gated: Gated, monkeypatch: Any) -> None:
    scheduler = start()
    decode = gated._engine.decode
    for wrong in (lambda pictures: pictures.astype(np.float32), lambda pictures: pictures[..., :2]):
        monkeypatch.setattr(gated, "decode", lambda latents, wrong=wrong: wrong(decode(latents)), raising=False)
        assert isinstance(scheduler.submit(job(), "a").exception(WAIT), EngineFault)


def test_black_is_believed_of_an_engine_that_can_draw_something_else(
    start: Start, gated: Gated, monkeypatch: Any
) -> None:
    scheduler = start()
    decode, black = gated._engine.decode, np.zeros((1, 32, 32, 3), np.uint8)
    monkeypatch.setattr(
        gated, "decode", lambda latents: black if gated.prompts[-1] == "night" else decode(latents), raising=False
    )
    (picture,) = scheduler.submit(job("night"), "a").result(WAIT)
    assert picture.image.getbbox() is None
    monkeypatch.setattr(gated, "decode", lambda latents: black, raising=False)
    assert isinstance(scheduler.submit(job("night"), "a").exception(WAIT), EngineFault)


def test_a_request_that_always_fails_harms_nobody_else(start: Start, gated: Gated, monkeypatch: Any) -> None:
    scheduler = start()
    encode = gated.encode

    def fails(prompts: Any) -> Any:
        if "cursed" in prompts:
            raise RuntimeError("a kernel died")
        return encode(prompts)

    monkeypatch.setattr(gated, "encode", fails)
    for _ in range(7):
        while scheduler.why_not_ready():  # for one picture, after each third fault
            time.sleep(0.01)
        assert isinstance(scheduler.submit(job("cursed"), "a").exception(WAIT), EngineFault)
    until(lambda: scheduler.why_not_ready() is None)
    assert scheduler.submit(job(), "b").result(WAIT)


def test_prompts_in_an_error_are_not_logged(start: Start, gated: Gated, caplog: Any) -> None:
    scheduler = start()
    gated.fail = lambda batch: RuntimeError(f"no kernel for {gated.prompts[-1]!r}")
    scheduler.submit(job("my secret \u00e9 \n words"), "a").exception(WAIT)
    assert "no kernel for '[prompt]'" in caplog.text
    assert "secret" not in caplog.text


def test_an_engine_that_always_fails_is_loaded_anew(start: Start, gated: Gated, tiny_pipe: Pipeline) -> None:
    scheduler = start(load=lambda: tiny_pipe)
    gated.fail = lambda batch: RuntimeError("CUDA error: device-side assert triggered")
    for _ in range(3):
        assert isinstance(scheduler.submit(job(), "a").exception(WAIT), EngineFault)
    until(lambda: scheduler.why_not_ready() is None)
    assert scheduler.submit(job(), "a").result(WAIT)


@pytest.mark.parametrize("kind", ["fails again", "cannot be loaded"])
def test_an_engine_that_fails_for_good_is_given_up(start: Start, gated: Gated, kind: str) -> None:
    def load() -> Pipeline:
        if kind == "cannot be loaded":
            raise MemoryError
        return Pipeline(gated)

    scheduler = start(load=load)
    lost = threading.Event()
    scheduler.on_lost = lost.set
    gated.fail = lambda batch: RuntimeError("gone")
    for _ in range(3):
        scheduler.submit(job(), "a").exception(WAIT)
    assert lost.wait(WAIT)
    assert scheduler.why_dead() == scheduler.why_not_ready() == "the engine fails"
    with pytest.raises(EngineFault):
        scheduler.submit(job(), "a")


def test_a_thread_that_ends_is_replaced(
    start: Start, gated: Gated, tiny_pipe: Pipeline, monkeypatch: Any, caplog: Any
) -> None:
    loads: list[int] = []

    def load() -> Pipeline:
        loads.append(1)
        return tiny_pipe

    scheduler = start(load=load)
    gated.hold()
    first = scheduler.submit(job(), "a")
    gated.wait_reached()
    second = scheduler.submit(job(), "b")
    thread = scheduler._thread
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    with monkeypatch.context() as patched:
        patched.setattr(scheduler._queue, "drawn", lambda *_: 1 / 0)
        gated.gate.set()
        thread.join(WAIT)
        first.result(WAIT)
    assert second.result(WAIT)  # which waited for the thread that died
    assert loads == [1]
    assert scheduler.why_dead() is None
    assert "thread ended" in caplog.text


def test_whoever_waits_for_an_engine_that_hangs_is_answered(start: Start, gated: Gated, caplog: Any) -> None:
    scheduler = start(hung_s=0.3, timeout_s=0.2)
    lost = threading.Event()
    scheduler.on_lost = lost.set
    gated.hold()
    running = scheduler.submit(job(seeds=(1, 2, 3)), "a")
    gated.wait_reached()
    waiting = scheduler.submit(job(), "b")
    live = scheduler.slot().put(job())
    assert isinstance(waiting.exception(WAIT), TooLate)
    assert isinstance(live.exception(WAIT), TooLate)
    assert isinstance(running.exception(WAIT), EngineFault)
    assert lost.wait(WAIT)
    assert scheduler.why_dead() == "the engine does not answer"
    assert "in denoise" in caplog.text  # where it hangs
    with pytest.raises(EngineFault):
        scheduler.submit(job(), "a")
    assert not scheduler.close()  # at once, although the thread hangs


def test_an_engine_that_goes_on_stage_by_stage_does_not_hang(start: Start, gated: Gated, monkeypatch: Any) -> None:
    scheduler = start(hung_s=0.4)
    denoise = gated.denoise

    def slow(*inputs: Any) -> Any:
        time.sleep(0.1)
        return denoise(*inputs)

    monkeypatch.setattr(gated, "denoise", slow)
    assert scheduler.submit(job(num_inference_steps=8), "a").result(WAIT)
    assert scheduler.why_dead() is None


def test_an_engine_that_answers_at_last_is_used_again(start: Start, gated: Gated) -> None:
    scheduler = start(hung_s=0.2)
    gated.hold()
    assert isinstance(scheduler.submit(job(), "a").exception(WAIT), EngineFault)
    gated.gate.set()
    until(lambda: scheduler.why_dead() is None)
    assert scheduler.submit(job(), "a").result(WAIT)


def test_a_known_picture_has_what_any_picture_has(tiny_pipe: Pipeline) -> None:
    (image,) = tiny_pipe(["a red apple"], seed=[0]).images
    assert isinstance(image, PIL.Image.Image)
    assert image.getbbox() is not None
