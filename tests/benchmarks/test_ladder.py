"""The ladder: what a rung is measured with, what its picture is compared with, and what a failure leaves."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from benchmarks import ladder
from benchmarks.ladder import KNOWN, PLAIN, RUNGS, Floors, Ladder
from onestill.bench.latency import MeasuringError, measure, measure_elsewhere
from onestill.bench.setting import Setting
from onestill.errors import OnestillError

BASE = Setting("onestill", "some-model", dtype="float16")


class Machine:
    """A machine on which each option takes as long as `ms` says, and draws pictures of one grey for each decoder."""

    def __init__(self, **ms: float) -> None:
        self.ms, self.asked = ms, []  # type: ignore[var-annotated]

    def __call__(self, setting: Setting) -> Mapping[str, Any]:
        self.asked.append(setting)
        options = {name for name, value in (setting.options or {}).items() if value}
        if "attention" in options:
            options |= {str((setting.options or {})["attention"])}
        if "flash" in options:
            raise MeasuringError("Measuring onestill failed: no kernel.", "Traceback\n  in kernel\nno kernel")
        total = 100 + sum(self.ms.get(name, 0) for name in options) + (-50 if setting.tiny_vae else 0)
        grey = 200 if setting.tiny_vae else 100
        pixels = np.full((8, 8, 3), grey + ("fuse" in options), np.uint8)
        PIL.Image.fromarray(pixels).save(str(setting.picture))
        return {"total_ms": {"p50": total}, "options": setting.options, "dtype": setting.dtype}


def climbed(machine: Machine, folder: Path, names: Any = tuple(RUNGS), **more: Any) -> dict[str, Any]:
    results: dict[str, Any] = {}
    Ladder(BASE, "tiny", machine, folder, results).climb(names, **more)
    return results


def test_what_is_left_out_does_not_leak(tmp_path: Path) -> None:
    machine = Machine(compile=-40, graphs=-10, fuse=-5, cudnn=-1)
    skipped = ("compiled blocks", "compiled blocks, channels last", "compiled whole", "CUDA graphs", "int8", "fp8")
    climbed(machine, tmp_path, [name for name in RUNGS if name not in skipped])
    assert all(setting.options.get("compile", "none") == "none" for setting in machine.asked)
    assert all(not setting.options["graphs"] for setting in machine.asked)
    assert machine.asked[-1].options["fuse"]


def test_what_was_refused_or_slower_is_not_carried_on(tmp_path: Path) -> None:
    machine = Machine(graphs=-10, fuse=+3, cudnn=-1)
    results = climbed(machine, tmp_path, kinds=("together",))
    assert results["CUDA graphs"]["together"]["carried_on"]
    assert not results["fused projections"]["together"]["carried_on"]
    last = results["channels last"]["together"]["options"]
    assert last == {**PLAIN, "graphs": True, "attention": "cudnn", "channels_last": True}
    assert results["attention by flash"]["together"] == {
        "refused": "Measuring onestill failed: no kernel.",
        "stderr": "Traceback\n  in kernel\nno kernel",
    }


def test_without_the_tiny_decoder_no_rung_has_it(tmp_path: Path) -> None:
    machine = Machine(graphs=-10)
    climbed(machine, tmp_path, [name for name in RUNGS if name != "tiny VAE"])
    assert all(setting.tiny_vae is None for setting in machine.asked)


def test_pictures_are_compared_with_those_of_the_same_decoder(tmp_path: Path) -> None:
    results = climbed(
        Machine(graphs=-10, fuse=-10), tmp_path, ["plain", "tiny VAE", "CUDA graphs", "fused projections"]
    )
    for kind, decoder in (("together", "tiny VAE"), ("alone", "the model's VAE")):
        fused = results["fused projections"][kind]
        assert fused["psnr_db"] == pytest.approx(48.1)  # one level of 255 everywhere
        assert fused["reference"] == "plain, the same decoder, float16"
        assert fused["decoder"] == decoder
        assert results["CUDA graphs"][kind]["equal"]


def test_a_rung_says_why_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "KNOWN", KNOWN - {"cudnn_benchmark"})
    results: dict[str, Any] = {}
    without = Ladder(BASE, None, Machine(), tmp_path, results)
    without.climb(["plain", "tiny VAE", "cuDNN benchmark", "channels last"])
    assert "no option 'cudnn_benchmark'" in results["cuDNN benchmark"]["alone"]["refused"]
    assert "--tiny-vae" in results["tiny VAE"]["together"]["refused"]
    without.climb(["channels last"], ends=time.monotonic() - 1)
    assert "time was up" in results["channels last"]["alone"]["refused"]


def test_fp8_is_asked_for_in_its_one_type_and_compiled(tmp_path: Path) -> None:
    machine = Machine()
    climbed(machine, tmp_path, ["fp8"])
    assert [setting.dtype for setting in machine.asked] == ["bfloat16"] * 2
    assert all(setting.options["compile"] == "regional" for setting in machine.asked)


def test_a_failure_is_written_at_once_with_all_that_was_said(tmp_path: Path) -> None:
    out = tmp_path / "results" / "ladder.json"
    arguments = argparse.Namespace(
        model=str(tmp_path / "nothing.safetensors"), random=None, tiny_vae=None, device="cpu", dtype="float32"
    )
    with pytest.raises(OnestillError, match="no model at"):
        ladder.run(argparse.Namespace(**vars(arguments), pictures=1, skip=[], kinds=["together"], minutes=1, out=out))
    results: dict[str, Any] = {}
    report = {"results": results}
    bad = Setting("onestill", "icons", engine="torch", device="cpu", options={"attention": "flashy"}, pictures=1)
    seen = []

    def written() -> None:
        ladder.write(report, out)
        seen.append(json.loads(out.read_text()))

    one = Ladder(bad, None, lambda setting: measure_elsewhere(bad), tmp_path, results, written)
    one.climb(["plain", "channels last"], kinds=("together",), ends=time.monotonic() + 0.5)
    assert len(seen) == 2
    first = seen[0]["results"]["plain"]["together"]
    assert "Did you mean 'flash'" in first["refused"]
    assert "Did you mean 'flash'" in first["stderr"]


def test_the_floor_is_found_once_for_all_rungs(tiny_folder: Path) -> None:
    floors = Floors()
    setting = Setting("onestill", str(tiny_folder), engine="torch", pictures=1, warm_up=0, repeats=0)
    measured = measure(setting)
    first, again = floors(setting, measured), floors(setting, measured)
    assert first == again
    assert first["floor_multiple"] > 0
    assert first["dtypes"] == {"text": "float32", "unet": "float32", "decoder": "float32"}
