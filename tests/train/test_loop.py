from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onestill.engine.device import choose
from onestill.errors import OutputError, RecipeError
from onestill.train.loop import TrainingStoppedError
from onestill.train.methods.autoencoder import Method
from onestill.train.monitor.log import Log
from onestill.train.optim.step import learning_rate_factor
from onestill.train.recipe import LoopOptions
from onestill.train.runtime.interrupt import REPEAT_S, Interrupted
from onestill.train.state import TrainState, checkpoints, save_checkpoint
from tests.train.small import NoiseBatches, rows, small_recipe, small_train


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 iterations that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    small_train(out, 20)
    return out


def nothing_half_written(out: Path) -> bool:
    return not [p for p in out.rglob("*") if p.name.startswith(".") or p.suffix == ".partial"]


def test_what_a_run_leaves(whole: Path) -> None:
    assert sorted(p.name for p in whole.iterdir()) == [
        "checkpoints", "events", "export", "metrics.jsonl", "recipe.json", "sheets",
    ]  # fmt: skip
    assert [p.name for p in checkpoints(whole / "checkpoints")] == ["00000018", "00000020"]
    assert [p.name for p in (whole / "sheets").iterdir()] == ["00000020.png"]
    assert [row["iteration"] for row in rows(whole)] == list(range(1, 21))
    assert rows(whole)[-1]["nimg"] == 40
    recipe = json.loads((whole / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["loop"]["grad_clip"] == 1.0
    assert next((whole / "events").iterdir()).stat().st_size > 0
    assert nothing_half_written(whole)


def test_two_and_resume_and_two_equal_four(whole: Path, tmp_path: Path) -> None:
    # Constant schedules, so that the length of a run does not matter.
    assert small_train(tmp_path, 2).iteration == 2
    state = small_train(tmp_path, 4, resume=True)
    assert (state.iteration, state.nimg) == (4, 8)
    assert rows(tmp_path) == rows(whole)[:4]


def test_killed_anywhere_it_goes_on_to_the_same_losses(whole: Path, tmp_path: Path) -> None:
    after = random.Random().randint(1, 17)
    print(f"killed after row {after}")
    child = subprocess.Popen([sys.executable, "-m", "tests.train.small", str(tmp_path), "1000000"])
    metrics = tmp_path / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 240
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < after:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    reached = max((int(p.name) for p in checkpoints(tmp_path / "checkpoints")), default=0)
    length = max(20, reached + 2)
    small_train(tmp_path, length, resume=True)
    expected = rows(whole)
    if length > 20:  # the machine let the child run on for long
        small_train(tmp_path / "again", length)
        expected = rows(tmp_path / "again")
    assert rows(tmp_path) == expected
    assert nothing_half_written(tmp_path / "checkpoints")


def test_a_row_cut_short_is_forgotten(whole: Path, tmp_path: Path) -> None:
    small_train(tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"iteration": 3, "nimg": 6, "l1": 9}\n{"iteration": 4, "ni')
    small_train(tmp_path, 4, resume=True)
    assert rows(tmp_path) == rows(whole)[:4]


def test_ctrl_c_saves_and_stops(whole: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    press = NoiseBatches(before=lambda i: signal.raise_signal(signal.SIGINT) if i == 4 else None)
    with pytest.raises(KeyboardInterrupt):
        small_train(tmp_path, 20, press)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "00000005"
    assert not (tmp_path / "export").exists()
    small_train(tmp_path, 20, resume=True)
    assert rows(tmp_path) == rows(whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def press(i: int) -> None:
        if i == 3:
            signal.raise_signal(signal.SIGINT)
            time.sleep(REPEAT_S + 0.1)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        small_train(tmp_path, 20, NoiseBatches(before=press))
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "00000002"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_comes_twice_by_two_ways_saves(tmp_path: Path, name: str) -> None:
    """The process group has it, and the parent hands it on: also while the checkpoint is written."""
    signum = signal.Signals[name]
    before = signal.getsignal(signum)
    batches = NoiseBatches(before=lambda i: [signal.raise_signal(signum) for _ in range(2)] if i == 2 else None)
    with pytest.raises(Interrupted) as stop:
        small_train(tmp_path, 20, batches, checkpoint_every=100)
    assert (stop.value.signum, stop.value.iteration) == (signum, 3)
    assert checkpoints(tmp_path / "checkpoints")[-1].name == "00000003"
    assert signal.getsignal(signum) is before
    assert nothing_half_written(tmp_path / "checkpoints")


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        batches = NoiseBatches(before=lambda i: signal.raise_signal(signal.SIGHUP))
        assert small_train(tmp_path, 3, batches).iteration == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_was_saved_a_moment_ago_is_not_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []

    def seen(state: TrainState, folder: Path, fingerprint: str) -> None:
        saved.append(state.iteration)
        save_checkpoint(state, folder, fingerprint)

    monkeypatch.setattr("onestill.train.loop.save_checkpoint", seen)
    press = NoiseBatches(before=lambda i: signal.raise_signal(signal.SIGINT) if i == 3 else None)
    with pytest.raises(Interrupted):
        small_train(tmp_path, 20, press)
    assert saved == [2, 4]


def test_a_full_disk_leaves_the_last_whole_checkpoint_and_says_so(tmp_path: Path) -> None:
    """A real refusal of the system: files may grow no larger than half a checkpoint's largest."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(i: int) -> None:
        if i == 3:
            sizes = [path.stat().st_size for path in (tmp_path / "checkpoints/00000002").iterdir()]
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) // 2, limits[1]))
            signal.raise_signal(signal.SIGTERM)

    try:
        with pytest.raises(OutputError, match=r"00000004 cannot be written .*00000002 before it is whole: make room"):
            small_train(tmp_path, 20, NoiseBatches(before=fill), log_every=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002"]
    assert small_train(tmp_path, 4, resume=True, log_every=1000).iteration == 4


def test_it_runs_outside_the_main_thread(tmp_path: Path) -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(small_train(tmp_path, 1).iteration))
    thread.start()
    thread.join()
    assert done == [1]


def test_a_step_with_nan_is_skipped_and_counted(tmp_path: Path) -> None:
    state = small_train(tmp_path, 4, NoiseBatches(spoiled=lambda i: i == 1), log_every=2)
    assert state.bad_steps == 1
    assert all(torch.isfinite(p).all() for net in state.networks.values() for p in net.parameters())
    assert all(torch.isfinite(value).all() for value in state.ema["autoencoder"].values())
    first, second = rows(tmp_path)
    assert (first["bad_steps"], second["bad_steps"]) == (1, 1)
    assert math.isfinite(first["l1"])  # the mean of the steps that counted
    assert math.isfinite(second["l1"])


def test_a_row_without_a_number_is_still_json(tmp_path: Path) -> None:
    small_train(tmp_path, 1, NoiseBatches(spoiled=lambda i: True))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"), parse_constant=refuse)
    assert row["l1"] is None


def test_a_sheets_numbers_are_json_whatever_they_are(tmp_path: Path) -> None:
    state = TrainState({}, {}, {}, torch.Generator())
    with Log(tmp_path, "small", state, 1) as log:
        log.sheet(state, np.zeros((1, 8, 8, 3), np.uint8), [""], {"steps_4_to_1": math.nan, "other": 1.0})
    numbers = json.loads((tmp_path / "sheets/00000000.json").read_text(encoding="utf-8"))
    assert numbers == {"steps_4_to_1": None, "other": 1.0}


def test_an_export_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Method, state: TrainState, folder: Path) -> None:
        export(self, state, folder)
        raise KeyboardInterrupt

    export = Method.export
    with monkeypatch.context() as patch:
        patch.setattr(Method, "export", stopped)
        with pytest.raises(KeyboardInterrupt):
            small_train(tmp_path, 1)
    assert not (tmp_path / "export").exists()
    for _ in range(2):  # the second in the place of the first
        small_train(tmp_path, 1, resume=True)
        assert (tmp_path / "export/vae/config.json").is_file()
        assert nothing_half_written(tmp_path)


def test_nan_upon_nan_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingStoppedError, match=r"3 steps in a row.*lower the learning rate"):
        small_train(tmp_path, 20, NoiseBatches(spoiled=lambda i: i > 3), max_bad_steps=3)
    assert len(rows(tmp_path)) == 7
    assert small_train(tmp_path, 8, NoiseBatches(), resume=True).iteration == 8


def test_good_steps_between_bad_ones_keep_it_alive(tmp_path: Path) -> None:
    assert small_train(tmp_path, 6, NoiseBatches(spoiled=lambda i: i % 2 == 0), max_bad_steps=2).bad_steps == 3


def test_a_run_is_not_overwritten(whole: Path) -> None:
    with pytest.raises(RecipeError, match="already holds a run: give --resume"):
        small_train(whole, 20)


def test_a_finished_run_resumed_exports_again(whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert small_train(whole, 20, resume=True).iteration == 20
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_another_recipe_cannot_go_on_and_leaves_the_run_alone(whole: Path) -> None:
    before = (whole / "recipe.json").read_bytes()
    with pytest.raises(RecipeError, match=r"loop\.ema_decay differ"):
        small_train(whole, 22, resume=True, ema_decay=0.5)
    assert (whole / "recipe.json").read_bytes() == before


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    for device in ("gpu", "cuda:77", "banana"):
        with pytest.raises(RecipeError, match=rf"loop\.device '{device}'"):
            small_train(tmp_path, 1, device=device)


def test_auto_takes_what_there_is_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small_train(tmp_path, 1, device="auto")
    assert next(state.networks["autoencoder"].parameters()).device.type == choose("auto")
    assert "loop.device is auto: torch computes on " in capsys.readouterr().err
    recipe = json.loads((tmp_path / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["loop"]["device"] == "auto", "elsewhere it may be another"


def test_optimizers_step_outside_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 Muon's products are so coarse that its steps go uphill."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *given: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    small_train(tmp_path, 2, precision="bf16")
    assert seen
    assert not any(seen)


def test_precisions_may_change_within_a_process(tmp_path: Path) -> None:
    for precision in ("bf16", "no"):
        small_train(tmp_path / precision, 3, precision=precision)
    full, half = rows(tmp_path / "no")[0]["l1"], rows(tmp_path / "bf16")[0]["l1"]
    assert full != half
    assert full == pytest.approx(half, rel=0.02)


def test_export_is_the_average_in_diffusers_format(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    state = small_train(tmp_path, 5)
    exported = AutoencoderTiny.from_pretrained(tmp_path / "export/vae")
    weights = state.networks["autoencoder"].state_dict()
    for name, value in exported.state_dict().items():
        assert torch.equal(value, state.ema["autoencoder"][name])
    assert any(not torch.equal(value, weights[name]) for name, value in exported.state_dict().items())


def test_learning_rate() -> None:
    constant = LoopOptions(iterations=100, warmup=4)
    assert [learning_rate_factor(i, constant) for i in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = LoopOptions(iterations=100, warmup=0, decay="cosine")
    assert learning_rate_factor(0, cosine) == 1.0
    assert learning_rate_factor(50, cosine) == pytest.approx(0.525)
    assert learning_rate_factor(100, cosine) == pytest.approx(0.05)


def test_the_same_seed_makes_the_same_networks(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, 1)
    first, second = (Method(recipe.options, recipe.loop) for _ in range(2))
    for one, other in zip(first.autoencoder.parameters(), second.autoencoder.parameters(), strict=True):
        assert torch.equal(one, other)
