"""The quarter of an hour, rehearsed whole on a CPU; and what it leaves where steps fail, hang or die."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quarter import supervisor
from benchmarks.quarter.__main__ import parser
from benchmarks.quarter.limits import OverranError, limited
from benchmarks.quarter.pieces import join_pieces, write_pieces
from benchmarks.quarter.record import MOST_BYTES, MOST_FILES, MOST_TOTAL, Record, brought_back, outbox, plain
from benchmarks.quarter.steps import STUCK, Run
from benchmarks.quarter.timetable import ENDS_S, FIRST_S, plan
from onestill.errors import CheckpointError, OutputError
from onestill.networks.denoiser import load_unet
from onestill.train.discriminator.cnn import LITE0
from recipes.icons.table import Icon, write_table
from tests.recipes.icon_rows import icon_rows
from tests.tiny import tiny_model
from tests.train.parts import save_cnn

ROOT = Path(__file__).parents[2]


# --- the whole of it ---


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first command, in which correctness has no time; then a second."""
    folder = tmp_path_factory.mktemp("quarter")
    fields = {field.name for field in dataclasses.fields(Icon)}
    icons = [Icon(source="emoji", **{k: v for k, v in r.items() if k in fields}) for r in icon_rows()]
    credit = {icon.set: {"name": icon.set, "author": "people", "licence": "MIT"} for icon in icons}
    write_table(icons, credit, folder / "icons.parquet")
    model = tiny_model(folder / "model", autoencoder="tiny", openvino=False)
    command = [sys.executable, "-m", "benchmarks.quarter", "--rehearse", "--work", str(folder / "work")]
    command += ["--parquet", str(folder / "icons.parquet"), "--autoencoder", str(model / "vae")]
    (folder / "networks").mkdir()
    save_cnn(folder / "networks" / LITE0)
    command += ["--networks", str(folder / "networks")]
    command += ["--text-encoder", str(model), "--samples", "48", "--samples-per-shard", "16", "--pixels", "32"]
    for name, more in (("first", ["--limit", "correctness=0.001"]), ("second", ["--second", "--limit", "compiled=1"])):
        done = subprocess.run([*command, "--out", str(folder / name), *more], cwd=ROOT, check=False)
        assert done.returncode == (1 if name == "first" else 0), name
    return folder


def steps(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "quarter.json").read_text(encoding="utf-8"))["steps"]
    return found


@pytest.mark.slow
def test_every_step_is_done_but_the_one_without_time(rehearsed: Path) -> None:
    first = steps(rehearsed, "first")
    assert list(first) == [*ENDS_S, "compiled"]
    states = {name: step["state"] for name, step in first.items()}
    assert states == {**dict.fromkeys(first, "done"), "correctness": "overran"}
    assert "Traceback" in first["correctness"]["traceback"]
    assert "OverranError" in first["correctness"]["traceback"]
    assert first["environment"]["machine"]["cpu"]["cores"] >= 1
    assert first["environment"]["matrix_tflops"]["float32"] > 0


@pytest.mark.slow
def test_speed_is_measured_beside_diffusers_and_the_floor(rehearsed: Path) -> None:
    first = steps(rehearsed, "first")
    assert "no GPU" in first["speed"]["twin"]
    found = first["speed"]["results"]
    for name in ("plain", "tiny VAE", "CUDA graphs", "fused projections", "channels last"):
        one = found[name]["together"]
        assert min(one["total_ms"]["p50"], one["floor_multiple"], *one["parts_by_events_ms"].values()) > 0
        assert one["psnr_db"] is None or one["psnr_db"] > 40, "another picture"
    for name in ("diffusers, tiny VAE", "diffusers, full VAE"):
        assert first["speed"]["times_faster"][name] > 0
        near = found[name]["psnr_db_to_ours_plain"]
        assert near is None or near > 40
        assert found[name]["dtypes"] == dict.fromkeys(("text", "unet", "decoder"), "float32")
    assert found["batch 2, tiny VAE"]["batch"] == 2
    assert found["attention by cuDNN"] == {"refused": "It needs a GPU."}
    assert "diffusers compiled, tiny VAE" in first["compiled"]["results"]


@pytest.mark.slow
def test_the_icons_are_drawn_encoded_trained_and_brought_back(rehearsed: Path) -> None:
    first = steps(rehearsed, "first")
    assert (first["latents"]["drawing"]["state"], first["latents"]["drawing"]["shards"]) == ("done", 3)
    assert first["latents"]["samples"] == 48
    for role in ("teacher", "student"):
        assert first[role]["iterations"] > 0
        assert first[role]["rows"]
        assert "not_brought_back" not in first[role]
        joined = join_pieces(rehearsed / "first", role, rehearsed / f"joined-{role}")
        export = load_unet(rehearsed / "work" / role / "export" / "unet")
        assert load_unet(joined).config["block_out_channels"] == export.config["block_out_channels"]
        for name, weight in load_unet(joined).state_dict().items():
            assert torch.equal(weight, export.state_dict()[name].half().float()), name
    count, total = outbox(rehearsed / "first")
    assert count <= MOST_FILES
    assert total <= MOST_TOTAL
    assert max(path.stat().st_size for path in (rehearsed / "first").iterdir()) <= MOST_BYTES


@pytest.mark.slow
def test_the_second_command_does_again_what_failed(rehearsed: Path) -> None:
    second = steps(rehearsed, "second")
    assert {name: step["state"] for name, step in second.items()} == {"correctness": "done", "compiled": "left out"}
    assert "it needs 60" in second["compiled"]["why"]
    checks = second["correctness"]["checks"]
    assert len(checks) >= 10
    assert all(one["ok"] for one in checks.values())
    assert "no GPU" in second["correctness"]["twin"]


# --- steps that fail, hang or die ---


@pytest.fixture
def run(tmp_path: Path) -> Run:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    given = ["--rehearse", "--out", str(out), "--work", str(work), "--autoencoder", str(tmp_path / "nothing")]
    options = parser().parse_args(given)
    options.limit = {}
    return Run(options, Record(out, work, {}), out, work, time.time(), "cpu")


# A step that overruns may end its process, which must not be pytest's.
STEPS = """
import sys, time
from pathlib import Path
from benchmarks.quarter.__main__ import parser
from benchmarks.quarter.icons import latents, teacher
from benchmarks.quarter.record import Record
from benchmarks.quarter.steps import Run, Step, run_steps

out, work, which, *given = sys.argv[1:]
options = parser().parse_args(["--rehearse", "--out", out, "--work", work, *given])
options.limit = {"slow": 0.1}

def fails(*_):
    raise ValueError("this is why")

def slow(*_):
    while True:
        time.sleep(0.01)

def written(run, seconds, note):
    note(half=0.5)
    return {"seconds": seconds, "nan": float("nan")}

todo = {
    "any": {"fails": fails, "slow": slow, "written": written, "late": written},
    "icons": {"latents": latents, "teacher": teacher},
}
record = Record(Path(out), Path(work), {})
run = Run(options, record, Path(out), Path(work), time.time(), "cpu")
run_steps(run, [Step(name, do, -1 if name == "late" else 600) for name, do in todo[which].items()])
"""


def steps_run(run: Run, which: str, *given: str) -> dict[str, Any]:
    """What became of the steps `which`, run by a process of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
        command = [sys.executable, "-c", STEPS, str(run.out), str(run.work), which, *given]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return steps(run.out.parent, run.out.name)


def test_what_fails_leaves_its_traceback_and_the_rest_goes_on(run: Run) -> None:
    found = steps_run(run, "any")
    states = ["failed", "overran", "done", "overran"]
    assert [step["state"] for step in found.values()] == states
    assert "this is why" in found["fails"]["traceback"]
    assert ", in slow\n" in found["slow"]["traceback"]
    assert (found["written"]["half"], found["written"]["nan"]) == (0.5, None)
    record = Record.read(run.out, run.work)
    assert record is not None
    assert record.failed() == ["fails", "slow", "late"]


def test_without_an_autoencoder_the_icons_fail_and_say_why(run: Run, tmp_path: Path) -> None:
    shards = str(ROOT / "src" / "onestill" / "data" / "sample")
    found = steps_run(run, "icons", "--autoencoder", str(tmp_path / "nothing"), "--shards", shards)
    assert found["latents"]["state"] == "failed"
    assert "nothing" in found["latents"]["traceback"]
    assert found["teacher"] == found["teacher"] | {"state": "left out", "why": "There are no latents to train on."}
    run.options.shards = shards
    assert [step.name for step in plan(run.options)] == ["environment", "correctness", "speed", "compiled"]


WORKER = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from benchmarks.quarter import steps
from benchmarks.quarter.record import Record
from benchmarks.quarter.steps import Run, Step, run_steps

steps.GRACE_S = 0.3
out, work = map(Path, sys.argv[1:3])

def hangs(*_):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)

def dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)

todo = {"hangs": hangs, "dies": dies, "works": lambda *_: {"one": 1}}
record = Record.read(out, work) or Record(out, work, {})
limit = {"hangs": 0.2}
run = Run(SimpleNamespace(rehearse=True, limit=limit), record, out, work, float(sys.argv[-1]), "cpu")
run_steps(run, [Step(name, do, 60) for name, do in todo.items() if name not in record.steps])
os._exit(0)
"""


def test_a_process_that_hangs_or_dies_is_started_again_at_the_next_step(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    (run.work / ".onestill-quarter").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
        status = supervisor.supervise(run.options, [sys.executable, str(script), str(run.out), str(run.work)])
    assert status == 1
    found = json.loads((run.out / "quarter.json").read_text(encoding="utf-8"))
    assert [step["state"] for step in found["steps"].values()] == ["stuck", "died", "done"]
    assert "time.sleep(60)" in found["steps"]["hangs"]["traceback"]
    assert "status -9" in found["steps"]["dies"]["traceback"]
    assert found["failed"] == ["hangs", "dies"]
    assert STUCK not in (0, 1)


def test_nothing_of_others_is_deleted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    run.options.work = str(tmp_path)
    with pytest.raises(OutputError, match="holds something else"):
        supervisor.supervise(run.options, ["false"])
    assert (tmp_path / "student").is_dir()


# --- limits ---


def test_an_inner_limit_leaves_the_outer_one_alone() -> None:
    before = time.monotonic()
    with limited(30, "outer"):
        with pytest.raises(OverranError, match="inner took more than"), limited(0.1, "inner"):
            time.sleep(30)
        assert time.monotonic() - before < 20
    with pytest.raises(OverranError, match="outer"):
        nested()


def nested() -> None:
    with limited(0.1, "outer"):
        try:
            with limited(30, "inner"):
                time.sleep(30)
        except OverranError:
            pytest.fail("the inner limit's time was not up")


# --- the timetable ---


def options(tmp_path: Path, *given: str) -> Any:
    found = parser().parse_args(["--work", str(tmp_path / "work"), *given])
    found.limit = {}
    return found


def test_steps_follow_each_other_and_end_in_time(tmp_path: Path) -> None:
    given = ["--autoencoder", str(tmp_path), "--shards", str(tmp_path)]
    found = plan(options(tmp_path, *given))
    ends = [step.ends_s for step in found]
    assert [step.name for step in found] == [
        "environment",
        "correctness",
        "speed",
        "latents",
        "teacher",
        "student",
        "compiled",
    ]
    assert ends == sorted(ends)
    assert ends[-1] < FIRST_S
    assert plan(options(tmp_path, *given, "--lasts", "300"))[-1].ends_s == 285


def test_the_second_command_knows_what_comes_first(tmp_path: Path) -> None:
    given = ["--second", "--autoencoder", str(tmp_path), "--shards", str(tmp_path)]
    icons = {name: {"state": "done"} for name in ("latents", "teacher", "student")}

    def names(*more: str, **earlier: dict[str, str]) -> list[str]:
        return [step.name for step in plan(options(tmp_path, *given, *more), earlier)]

    assert names(**icons) == ["student", "compiled"]
    assert names(**icons, speed={"state": "stuck"}) == ["speed", "compiled"]
    waited = {"latents": {"state": "failed"}, "teacher": {"state": "left out"}, "student": {"state": "left out"}}
    assert names(**waited) == ["latents", "teacher", "student", "compiled"]
    assert names("--again", "compiled", **icons) == ["compiled"]
    assert names() == ["compiled"]


# --- what is brought back ---


def test_weights_come_back_in_pieces_and_together_again(tmp_path: Path) -> None:
    weights = {f"layer{i}": torch.randn(1024, 1024 * 3) for i in range(8)} | {"steps": torch.tensor(7)}
    pieces = write_pieces(weights, tmp_path, "student", {"width": 3}, 12)
    assert len(pieces) == 4
    assert max(path.stat().st_size for path in pieces) <= MOST_BYTES
    small = {name: weights[name] for name in ("layer0", "steps")}
    joined = join_pieces(tmp_path, "student", tmp_path / "unet")
    assert json.loads((joined / "config.json").read_text(encoding="utf-8")) == {"width": 3}
    pieces[1].unlink()
    with pytest.raises(CheckpointError, match="3 pieces of 'student'"):
        join_pieces(tmp_path, "student", tmp_path / "unet")
    assert len(write_pieces(small, tmp_path, "student", {}, 13)) == 1
    assert len(list(tmp_path.glob("student-*"))) == 1


def test_no_more_is_brought_back_than_may_be(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    large = tmp_path / "large.bin"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    assert not brought_back(large, out)
    small = tmp_path / "small.bin"
    small.write_bytes(b"x")
    for number in range(MOST_FILES):
        (out / str(number)).write_bytes(b"y")
    assert not brought_back(small, out)
    (out / "0").unlink()
    assert brought_back(small, out)
    assert len(plain({"text": "x" * 10**6})["text"]) < 30_000
