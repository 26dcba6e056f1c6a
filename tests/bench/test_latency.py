from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.quarter.networks import SMALL
from onestill.bench.chart import bars
from onestill.bench.compare import not_alike, ratios
from onestill.bench.contenders import comparable, load_contender
from onestill.bench.latency import MeasuringError, measure, measure_elsewhere, percentile, prompts, psnr
from onestill.bench.roofline import count_gflop, matrix_tflops
from onestill.bench.setting import Setting, with_contender
from onestill.checkpoint import describe, model_path
from onestill.checkpoint.header import read_header
from onestill.cli import main
from onestill.errors import OnestillError
from onestill.networks.random_weights import CONFIGS, meta_module, random_model
from tests.on_cpu import load


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model("sdxl", tmp_path_factory.mktemp("models") / "small", SMALL)


def test_real_sizes_are_the_published_ones() -> None:
    def millions(kind: str, name: str, made: str) -> float:
        return round(sum(one.numel() for one in meta_module(made, CONFIGS[kind][name]).parameters()) / 1e6, 1)

    assert millions("sdxl", "unet", "UNet2DConditionModel") == 2567.5
    assert millions("sdxl", "text_encoder", "CLIPTextModel") == 123.1
    assert millions("sdxl", "text_encoder_2", "CLIPTextModelWithProjection") == 694.7
    assert millions("sd21", "unet", "UNet2DConditionModel") == 865.9
    with pytest.raises(OnestillError, match="no random model"):
        random_model("sd9", Path("nowhere"))


def test_a_model_without_weights_is_as_long(small: Path, tmp_path: Path) -> None:
    hollow = random_model("sdxl", tmp_path / "hollow", SMALL, filled=False)
    for file in small.rglob("*.safetensors"):
        other = hollow / file.relative_to(small)
        assert other.stat().st_size == file.stat().st_size
        assert read_header(other) == read_header(file)


def test_a_random_model_draws_and_says_what_it_is(small: Path) -> None:
    pipe = load(small)
    assert (pipe.info.name, pipe.info.made) == ("random-sdxl", {"weights": "random"})
    picture = np.asarray(pipe("a red apple", seed=1).images[0])
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 1
    tiny = np.asarray(load(small, tiny_vae=small / "tiny_vae")("a red apple", seed=1).images[0])
    assert tiny.std() > 1


def test_contenders_draw_the_same_picture(small: Path, tmp_path: Path) -> None:
    setting = Setting("onestill", str(small), engine="torch", pictures=1, warm_up=0, repeats=0)
    pictures = {name: tmp_path / f"{name}.png" for name in ("onestill", "diffusers")}
    for name, picture in pictures.items():
        measure(with_contender(replace(setting, picture=str(picture)), name))
    difference = psnr(*pictures.values())
    assert difference is None or difference > 50
    assert with_contender(replace(setting, dtype="int8"), "diffusers").dtype is None


def test_int8_has_a_rate_too() -> None:
    assert matrix_tflops("cpu", "int8") > 0


def test_operations_are_the_ones_counted_by_hand(small: Path) -> None:
    info = describe(small)
    once = count_gflop(info, batch=1, height=64, width=64)
    assert min(once.values()) > 0
    twice = count_gflop(info, batch=2, height=64, width=64)
    # Sizes and timesteps are embedded once a call or once an image; all else grows with the batch.
    assert twice["unet"] == pytest.approx(2 * once["unet"], rel=0.01)
    assert twice["decoder"] == pytest.approx(2 * once["decoder"])


@pytest.mark.parametrize("contender", ["onestill", "diffusers"])
def test_every_contender_tells_where_the_time_went(small: Path, contender: str) -> None:
    setting = Setting(contender, str(small), engine="torch", pictures=2, warm_up=1, tiny_vae=str(small / "tiny_vae"))
    found = measure(setting)
    parts = [found[part]["p50"] for part in ("encode_ms", "denoise_ms", "decode_ms")]
    assert min(parts) > 0
    assert found["total_ms"]["p50"] >= max(parts)
    assert found["images_per_second"] == pytest.approx(1000 / found["total_ms"]["p50"], rel=0.01)
    assert found["peak_memory_mb"] > 50
    assert found["load_ms"] > 0


def test_a_failure_elsewhere_is_one_sentence() -> None:
    with pytest.raises(OnestillError, match="took more than 0 s and was ended"):
        measure_elsewhere(Setting("onestill", "icons"), most_s=0.01)
    with pytest.raises(OnestillError, match="no model named 'nothing'"):
        measure_elsewhere(Setting("onestill", "nothing"))
    with pytest.raises(OnestillError, match="no contender"):
        measure(Setting("someone", "icons"))


def test_the_command_compares_with_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pictures", "2", "--warm-up", "1", "--compare", "diffusers", "--plot", str(tmp_path / "bars.svg")]
    assert main(["bench", *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["contender"] for one in report["results"]] == ["onestill", "diffusers"]
    assert report["random_weights"] is False
    assert [one["device"] for one in report["results"]] == ["cpu", "cpu"], "where ours ran, whatever torch has"
    assert list(report["times_faster_than_diffusers"]) == ["diffusers, batch 1"]
    assert all(one["floor_multiple"] > 0 for one in report["results"])
    assert report["machine"]["cpu"]["cores"] >= 1
    ElementTree.parse(tmp_path / "bars.svg")


def test_prompts_differ_and_percentiles_are_measured_values() -> None:
    assert len(set(prompts(2000))) == 2000
    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (0, 50, 95, 100)] == [1.0, 2.0, 3.0, 3.0]


def test_the_chart_names_every_contender() -> None:
    one = {part: {"p50": 5.0, "p95": 6.0} for part in ("encode_ms", "denoise_ms", "decode_ms", "total_ms")}
    drawn = bars([{**one, "contender": "onestill & co", "dtype": "float32", "batch": 1}])
    assert "onestill &amp; co, float32, batch 1" in drawn


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for options, sentence in (
        (["--compare", "someone"], "no 'someone' to compare with"),
        (["--random", "sdxxl"], "Did you mean 'sdxl'"),
        (["--model", "nothing"], "no model named"),
        (["--device", "gpu"], "error: There is no device 'gpu'"),
    ):
        assert main(["bench", *options]) == 2
        assert sentence in capsys.readouterr().err
    assert model_path("icons").is_dir()


# --- a comparison changes one thing ---


def test_each_part_says_what_it_computed_in(small: Path) -> None:
    once: dict[str, Any] = {"pictures": 1, "warm_up": 0, "repeats": 0, "dtype": "float16"}
    whole = measure(Setting("onestill", str(small), engine="torch", **once))
    assert whole["dtypes"] == {"text": "float16", "unet": "float16", "decoder": "float32"}  # no bfloat16 on a CPU
    tiny = str(small / "tiny_vae")
    half = dict.fromkeys(("text", "unet", "decoder"), "float16")
    assert measure(Setting("onestill", str(small), engine="torch", tiny_vae=tiny, **once))["dtypes"] == half
    assert measure(Setting("diffusers", str(small), tiny_vae=tiny, **once))["dtypes"] == half
    assert measure(Setting("diffusers", str(small), **once))["dtypes"] == half | {"decoder": "float32"}
    assert measure(Setting("onestill", "icons", pictures=1))["dtypes"]["unet"] in ("int8", "bfloat16", "float32")


def test_what_would_be_cast_is_compared_in_bfloat16(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    asked = Setting("onestill", str(small), device="cuda")
    assert comparable(asked).dtype == "bfloat16"
    for same in (
        replace(asked, tiny_vae="some-folder"),
        replace(asked, dtype="bfloat16"),
        replace(asked, device="cpu", dtype="float16"),
        replace(asked, model="icons"),  # an AutoencoderTiny, which never is cast
    ):
        assert comparable(same) == same
    with pytest.raises(OnestillError, match="no comparison; compare with --dtype bfloat16, or with --tiny-vae"):
        comparable(replace(asked, dtype="float16"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert comparable(asked) == asked


def test_a_ratio_of_different_types_says_so() -> None:
    ours = {"contender": "onestill", "batch": 1, "total_ms": {"p50": 2.0}}
    theirs = {"contender": "diffusers", "batch": 1, "total_ms": {"p50": 5.0}, "dtypes": dict.fromkeys("ab", "float32")}
    same = [{**ours, "dtypes": dict.fromkeys("ab", "float32")}, theirs]
    assert ratios(same) == {"diffusers, batch 1": 2.5}
    assert not_alike(same) == {}
    other = [{**ours, "dtypes": {"a": "int8", "b": "float32"}}, theirs]
    assert not_alike(other) == {"diffusers, batch 1": {"a": "int8 and float32"}}


def test_a_failure_elsewhere_keeps_all_that_was_said(small: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    (broken / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EulerDiscreteScheduler"}')
    config = json.loads((broken / "unet" / "config.json").read_text())
    (broken / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [64, 128]}))
    with pytest.raises(MeasuringError) as caught:
        measure_elsewhere(Setting("diffusers", str(broken), pictures=1))
    assert "Traceback" in caught.value.stderr
    assert "block_out_channels" in caught.value.stderr
    assert "\n" not in str(caught.value)


def test_one_that_fails_leaves_the_others_results(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first batch is more than the pipeline draws at once, so that contender alone fails.
    options = ["--model", str(small), "--batch", "9999", "--batch", "1", "--pictures", "1", "--warm-up", "0"]
    assert main(["bench", *options, "--json"]) == 2
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [one["batch"] for one in report["results"]] == [1]
    assert list(report["failed"]) == ["onestill, batch 9999"]
    assert report["failed"]["onestill, batch 9999"]["stderr"].strip()


def test_a_contender_that_is_loaded_is_measured_where_it_is(small: Path) -> None:
    setting = Setting("onestill", str(small), engine="torch", warm_up=1, pictures=500, repeats=3)
    loaded = load_contender(setting)
    found = measure(setting, loaded=loaded, most_s=0.05)
    assert found["load_ms"] < 1000
    assert 1 <= found["pictures"] < 500
    assert found["cached_ms"] is None
