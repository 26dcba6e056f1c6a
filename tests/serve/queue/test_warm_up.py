"""What is prepared before anyone asks: all that the scheduler's calls will need, in every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onestill.engine.openvino.icons import MANY
from onestill.serve.queue.jobs import Job
from onestill.serve.queue.scheduler import Limits, Scheduler
from onestill.serve.queue.warm_up import warm_up
from tests.on_cpu import load


def test_the_larger_batch_of_openvino_is_ready_where_calls_are_as_large(tiny_folder: Path) -> None:
    for most, sizes in ((1, {1}), (MANY - 1, {1}), (MANY, {1, MANY}), (64, {1, MANY})):
        pipe, said = load(tiny_folder, engine="openvino"), []
        warm_up(pipe, most, said.append)
        engine: Any = pipe.engine
        for part in ("text_encoder", "unet", "decoder"):
            assert set(engine._parts[part]._compiled) == sizes, (most, part)
        assert len(said) == 1
        assert said[0].endswith("32x32 px, num_inference_steps 1")


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8])])
def test_torch_draws_every_number_that_a_call_may_have(tiny_folder: Path, most: int, sizes: list[int]) -> None:
    pipe, said = load(tiny_folder, engine="torch"), []
    engine: Any = pipe.engine
    encoded: list[int] = []
    decoded: list[int] = []
    engine._networks.text_encoder.towers[0].register_forward_hook(
        lambda _, inputs, output: encoded.append(len(inputs[0]))
    )
    engine._networks.latent_space.decoder.post_quant_conv.register_forward_hook(
        lambda _, inputs, out: decoded.append(len(inputs[0]))
    )
    warm_up(pipe, most, said.append)
    assert encoded == decoded == sizes
    assert ", ".join(map(str, sizes)) in said[0]


def test_a_scheduler_calls_for_no_more_than_was_warmed(tiny_folder: Path) -> None:
    pipe = load(tiny_folder, engine="torch")
    engine: Any = pipe.engine
    decoded: list[int] = []
    engine._networks.latent_space.decoder.post_quant_conv.register_forward_hook(
        lambda _, inputs, out: decoded.append(len(inputs[0]))
    )
    scheduler = Scheduler(pipe, Limits(batch=4))
    try:
        jobs = [Job("a red apple", tuple(range(first, first + 9)), 1, 32, 32) for first in (0, 20)]
        for future in [scheduler.submit(job, f"client {number}") for number, job in enumerate(jobs)]:
            future.result(60)
    finally:
        scheduler.close()
    assert sum(decoded) == 18
    assert max(decoded) == engine.warm_ups(4)[-1] == 4
