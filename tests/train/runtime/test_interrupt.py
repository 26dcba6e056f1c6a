"""Signals to real processes: a stage by itself, under the icons' command and `timeout`, and under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from onestill.train.state import checkpoints
from tests.train import small

MOST_S = 300.0
ROOT = Path(__file__).parents[3]
WITH_WORKER = small.RECIPE.replace("[data]", "[data]\nworkers = 1")
RECIPE = f"""{WITH_WORKER}
[loop]
iterations = 100000000
batch_size = 4
threads = 1
checkpoint_every = 100000000
sheet_every = 100000000
log_every = 1
"""
TRAIN = [sys.executable, "-m", "onestill", "train", "tiny.toml"]
STAGE = "1-autoencoder"
# The icons' own first stage, on the packaged sample set and as narrow as it goes.
NARROW = ["loop.iterations=100000000", "loop.batch_size=2", "loop.threads=1", "loop.log_every=1", "data.workers=0",
          "loop.sheet_every=100000000", "loop.checkpoint_every=100000000", 'data.shards=["sample"]',
          "autoencoder.encoder_width=4", "autoencoder.decoder_width=4", "autoencoder.latent_channels=4",
          "autoencoder.encoder_blocks=[0, 0, 1]", "autoencoder.decoder_blocks=[1, 0, 0]",
          "autoencoder.perceptual=0"]  # fmt: skip
ICONS = [sys.executable, "-m", "recipes.icons.train", "--parquet", "none.parquet", "--from", STAGE, "--to", STAGE]
ICONS += [word for setting in NARROW for word in ("--set", setting)]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a recipe that never ends, and shards of noise for it."""
    small.write_noise_shards(tmp_path / "shards")
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return tmp_path


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@contextmanager
def started(command: list[str], here: Path, run: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, once it has trained for a few iterations."""

    def listen() -> None:  # what starts the tests may have made its children deaf
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)

    said = (here / "said.txt").open("w+", encoding="utf-8")
    with (
        said,
        subprocess.Popen(
            command,
            cwd=here,
            env=environment(),
            stdout=said,
            stderr=said,
            text=True,
            start_new_session=True,
            preexec_fn=listen,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + MOST_S
            while len(rows(run)) < 3:
                assert process.poll() is None, (here / "said.txt").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            for each in (process.pid, *children(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """All processes below `pid`, in other sessions too."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True))
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    whole = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in whole if line.endswith("\n")]


def check_saved(run: Path, here: Path) -> int:
    """One whole checkpoint, of the last iteration that was logged; no traceback; nothing half written."""
    (saved,) = checkpoints(run / "checkpoints")
    assert int(saved.name) == rows(run)[-1]["iteration"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [saved.name]
    said = (here / "said.txt").read_text(encoding="utf-8")
    assert f"saved at iteration {int(saved.name)}: --resume continues from there" in said
    return int(saved.name)


@pytest.mark.slow
def test_ctrl_c_twice_within_a_second_saves_and_the_run_goes_on(here: Path) -> None:
    with started(TRAIN, here, here / "run") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(MOST_S) == 130
    reached = check_saved(here / "run", here)
    said = (here / "said.txt").read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert said.endswith("interrupted\n")
    more = [*TRAIN, "--resume", "--set", f"loop.iterations={reached + 2}"]
    subprocess.run(more, cwd=here, env=environment(), check=True, capture_output=True)
    assert [row["iteration"] for row in rows(here / "run")] == list(range(1, reached + 3))


def to_timeout(signum: int) -> Callable[[subprocess.Popen[str]], None]:
    """What `timeout` does when the time is over, it does with a signal to itself: to its child, then to the group."""
    return lambda process: process.send_signal(signum)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "send", "status"),
    [
        (["timeout", "-s", "INT", "100000"], to_timeout(signal.SIGINT), 130),
        ([], lambda process: process.send_signal(signal.SIGTERM), 143),
        ([], lambda process: os.killpg(process.pid, signal.SIGHUP), 129),
    ],
    ids=["timeout -s INT", "SIGTERM to the command alone", "SIGHUP to the group"],
)
def test_the_icons_command_waits_until_its_stage_has_saved(
    here: Path, before: list[str], send: Callable[[subprocess.Popen[str]], None], status: int
) -> None:
    if before and shutil.which(before[0]) is None:
        pytest.skip("there is no `timeout`")
    run = here / "runs/icons-cpu/autoencoder"
    with started([*before, *ICONS], here, run) as process:
        stage = next(pid for pid in children(process.pid) if is_train(pid))
        send(process)
        assert process.wait(MOST_S) == status
        assert not Path(f"/proc/{stage}").exists()  # it was waited for
    check_saved(run, here)
    said = (here / "said.txt").read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert f"{STAGE}: ended with exit status {status}" in said


def command_line(pid: int) -> str:
    return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout


def is_train(pid: int) -> bool:
    return " onestill train " in command_line(pid)


@pytest.mark.slow
def test_torchrun_hands_the_signal_on_and_all_its_processes_save_together(here: Path) -> None:
    run = here / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    with started([*launcher, *TRAIN[2:]], here, run) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(MOST_S) != 0
    check_saved(run, here)
    said = (here / "said.txt").read_text(encoding="utf-8")
    assert said.count("saved at iteration") == 2
    assert said.count("interrupted\n") == 2
