"""SD and SDXL in OpenVINO's form against torch, at tiny width."""

from __future__ import annotations

import locale
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import shared_core

import numpy as np
import openvino
import PIL.Image
import pytest
import torch
from openvino import opset13

from onestill.checkpoint import describe, verify
from onestill.cli import main
from onestill.engine.openvino.int8 import round_inputs
from onestill.errors import CheckpointError, NotEnoughMemoryError, OnestillError
from onestill.export.stored_weights import export_sd
from onestill.pipeline import Pipeline
from tests.on_cpu import load, needs_vnni
from tests.tiny import tiny_autoencoder
from tests.tiny_sd import FAMILIES, single_file, tiny_sd

PROMPTS = ["a red apple", "a green heart"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = str(request.param)
    return tiny_sd(tmp_path_factory.mktemp("models") / family, family, dtype=torch.float16)


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_sd(describe(folder), tmp_path_factory.mktemp("exported") / folder.name)


def levels(pipe: Pipeline, **settings: Any) -> Any:
    return np.stack([np.asarray(image, dtype=np.int16) for image in pipe(PROMPTS, seed=3, **settings).images])


def test_it_draws_what_torch_draws(folder: Path, exported: Path) -> None:
    slow, quick = load(folder), load(exported, dtype="float32")
    assert (quick.engine.name, slow.engine.name) == ("openvino", "torch")
    assert quick.info.timesteps(4) == slow.info.timesteps(4)
    image = PIL.Image.new("RGB", (64, 64), "orange")
    for settings in (
        {},
        {"num_inference_steps": 2, "guidance_scale": 2.0},
        {"num_inference_steps": 2, "image": image, "strength": 0.5},
        {"num_inference_steps": 1, "height": 96, "width": 64},
        {"num_inference_steps": 1, "height": 72, "width": 104},  # latents that do not halve evenly
        {"num_inference_steps": 1},
    ):
        difference = np.abs(levels(slow, **settings) - levels(quick, **settings))
        assert difference.max() <= 2, settings


def test_bfloat16_is_near(folder: Path, exported: Path) -> None:
    difference = np.abs(levels(load(folder)) - levels(load(exported, dtype="bfloat16")))
    assert difference.mean() < 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SDXL at tiny width, and its form in int8."""
    folder = tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl", dtype=torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onestill.engine.openvino.int8.SMALLEST_INT8", 2**10)
        return folder, export_sd(describe(folder), folder.parent / "int8", weights="int8")


def test_int8_weights_are_half_as_large_and_near(small: tuple[Path, Path], tmp_path: Path) -> None:
    folder, form = small
    (half,) = (folder / "unet").glob("*.safetensors")
    assert (form / "openvino" / "unet.bin").stat().st_size < 0.65 * half.stat().st_size
    difference = np.abs(levels(load(folder)) - levels(load(form, dtype="float32")))
    assert 0 < difference.mean() < 4
    with pytest.raises(OnestillError, match="choose from float16, int8"):
        export_sd(describe(folder), tmp_path / "x", weights="int3")


@needs_vnni
def test_int8_is_computed_in_int8_and_near(small: tuple[Path, Path], exported: Path) -> None:
    folder, form = small
    fast = "INT8" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    quick = load(form, dtype="int8" if not fast else None)
    assert quick.engine.dtype == "int8"
    exact, found = (levels(load(form, dtype="float32")), levels(quick))
    assert 0 < np.abs(exact - found).mean() < 4
    image = PIL.Image.new("RGB", (64, 64), "orange")
    settings: dict[str, Any] = {"num_inference_steps": 2, "image": image, "strength": 0.5}
    assert np.abs(levels(load(folder), **settings) - levels(quick, **settings)).mean() < 5
    with pytest.raises(OnestillError, match="no int8 form; choose float32 or bfloat16"):
        load(exported, dtype="int8")


@needs_vnni
def test_convolutions_and_matrices_are_multiplied_in_int8(small: tuple[Path, Path]) -> None:
    # What the compiled network says of itself, as speed is nothing that a test can see.
    engine: Any = load(small[1], dtype="int8").engine
    (compiled,) = (one.network.get_runtime_model() for one in engine._networks["unet"]._compiled.values())
    told = [node.get_rt_info() for node in compiled.get_ordered_ops()]
    kinds = {(one["layerType"].astype(str), one["primitiveType"].astype(str).lower()) for one in told}
    for layer in ("Convolution", "FullyConnected"):
        assert any(name.startswith(layer) and kind.endswith("i8") for name, kind in kinds), kinds


@pytest.mark.parametrize("source", ["relu", "swish", "tanh"])
def test_rounding_a_convolution_is_what_it_is_by_hand(source: str) -> None:
    numbers = np.random.default_rng(0)
    weight = numbers.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8)
    unit = np.full((16, 1, 1, 1), 0.001, np.float32)
    given = opset13.parameter([1, 16, 8, 8], openvino.Type.f32, name="x")
    kept = opset13.multiply(opset13.convert(opset13.constant(weight), "f32"), opset13.constant(unit))
    x = getattr(opset13, source)(given)
    model = openvino.Model([opset13.convolution(x, kept, [1, 1], [1, 1], [1, 1], [1, 1])], [given])
    round_inputs(model)
    picture = 4 * numbers.standard_normal((1, 16, 8, 8)).astype(np.float32)
    found = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([picture])[0]

    act = {"relu": torch.relu, "swish": torch.nn.functional.silu, "tanh": torch.tanh}[source]
    value = act(torch.from_numpy(picture)).double()
    low = {"relu": 0.0, "swish": -0.25, "tanh": -128 / 127}[source]
    step = (1 - low) / 255
    rounded = torch.round(value / value.abs().max() / step) * step * value.abs().max()
    expected = torch.nn.functional.conv2d(rounded, torch.from_numpy(weight * unit).double(), padding=1).numpy()
    exact = torch.nn.functional.conv2d(value, torch.from_numpy(weight * unit).double(), padding=1).numpy()
    assert np.abs(found - expected).mean() < 1e-3 * expected.std()  # a number half way between steps may go either way
    assert 0 < np.abs(found - exact).std() < 0.02 * exact.std()


def test_eight_threads_draw_what_each_would_alone(small: tuple[Path, Path]) -> None:
    pipe = load(small[1])
    alone = {seed: np.asarray(pipe("a red apple", seed=seed).images[0]) for seed in range(4)}

    def draw(seed: int) -> bool:
        return bool((np.asarray(pipe("a red apple", seed=seed % 4).images[0]) == alone[seed % 4]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(draw, range(24)))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    small: tuple[Path, Path], exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onestill.engine.memory._available", lambda: 2**16)
    with pytest.raises(NotEnoughMemoryError, match=r"in float32 .* export it with --weights int8"):
        load(exported, dtype="float32")
    with pytest.raises(NotEnoughMemoryError, match="load it with dtype 'int8'"):
        load(small[1], dtype="float32")


def test_a_size_that_cannot_be_compiled_leaves_the_engine_working(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(exported)
    expected = levels(pipe)
    core: Any = pipe.engine._networks["unet"]._core  # type: ignore[attr-defined]

    class Full:
        """OpenVINO's core on a machine without memory: compiling says what it says there."""

        def read_model(self, path: str) -> Any:
            return core.read_model(path)

        def get_property(self, *asked: Any) -> Any:
            return core.get_property(*asked)

        def compile_model(self, *asked: Any) -> Any:
            raise RuntimeError("Exception from src/plugins: std::bad_alloc")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.engine._networks["unet"], "_core", Full())  # type: ignore[attr-defined]
        with pytest.raises(NotEnoughMemoryError, match="run 'unet' at this size; draw fewer or smaller"):
            levels(pipe, height=96)
    np.testing.assert_array_equal(levels(pipe), expected)


def test_a_single_file_with_a_tiny_decoder_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_sd(tmp_path / "xl", "sdxl")
    file = single_file(folder, tmp_path / "model.safetensors", "sdxl", notes={"modelspec.resolution": "64x64"})
    torch.manual_seed(0)
    tiny = tiny_autoencoder()
    tiny.register_to_config(scaling_factor=1.0)
    tiny.save_pretrained(tmp_path / "taesdxl")
    out = tmp_path / "out"
    options = ["--model", str(file), "--tiny-vae", str(tmp_path / "taesdxl"), "--out", str(out)]
    assert main(["export", *options]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    expected = levels(load(file, tiny_vae=tmp_path / "taesdxl"))
    assert np.abs(levels(load(out, dtype="float32")) - expected).max() <= 2
    assert not list(out.rglob("*.safetensors"))
    (out / "openvino" / "unet.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"unet\.bin' has 5 of"):
        verify(out)


def test_the_second_start_reads_what_the_first_one_compiled(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONESTILL_CACHE", str(tmp_path))
    kept = tmp_path / "openvino-sd"
    first = levels(load(small[1]))
    files = {file: file.stat().st_mtime_ns for file in kept.glob("*/*.blob")}
    assert {file.parent.name.rsplit("-", 1)[0] for file in files} == {
        "decoder",
        "text_encoder",
        "text_encoder_2",
        "time",
        "unet",
    }
    before = locale.setlocale(locale.LC_ALL)
    pipe = load(small[1])
    assert locale.setlocale(locale.LC_ALL) == before, "OpenVINO's cache works in the locale 'C'"
    np.testing.assert_array_equal(levels(pipe), first)
    levels(pipe, height=96)
    assert {file: file.stat().st_mtime_ns for file in kept.glob("*/*.blob")} == files, (
        "written again, or another size's"
    )
