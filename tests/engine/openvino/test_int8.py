"""int8 on OpenVINO: what is written, what it draws, and what happens without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from onestill.engine.openvino.runtime import shared_core

import numpy as np
import pytest
from numpy.typing import NDArray

from onestill.checkpoint import describe, model_path
from onestill.engine import load_engine
from onestill.engine.openvino.cpu import lacks_vnni, multiplies_int8
from onestill.engine.openvino.engine import OpenVinoEngine
from onestill.engine.openvino.int8 import layer_nodes, quantize
from onestill.engine.openvino.shared_weights import read_index, read_int8
from onestill.engine.openvino.stored_weights import StoredWeights
from onestill.engine.protocol import Conditioning
from onestill.errors import CheckpointError, OnestillError
from onestill.export.calibrate import write_int8
from onestill.export.shared_weights import export_openvino
from onestill.export.stored_weights import export_sd
from onestill.pipeline import Pipeline
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd

FORM = "openvino/int8.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose every network draws well in int8."""
    if lacks_vnni():
        pytest.skip("this CPU has no VNNI, and int8 is refused")
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny", autoencoder="tiny")
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch)
        write_int8(describe(folder))
    return folder


def measure_little(patch: pytest.MonkeyPatch) -> None:
    for count in ("CALIBRATION", "MEASURED"):
        patch.setattr(f"onestill.export.calibrate.{count}", 16)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "tiny"))


def pictures(folder: Path, dtype: str, steps: int = 1) -> NDArray[np.float64]:
    drawn = Pipeline(OpenVinoEngine(describe(folder), dtype=dtype))(
        ["a red apple", "a green heart"], seed=3, num_inference_steps=steps
    )
    return np.stack([np.asarray(image, dtype=np.float64) for image in drawn.images])


def test_both_networks_that_gain_are_in_int8_and_draw_nearly_as_in_float32(folder: Path) -> None:
    form = read_int8(folder)
    assert form is not None
    assert {part: len(layers) > 3 for part, layers in form.parts.items()} == dict.fromkeys(
        ("text_encoder", "decoder"), True
    )
    assert set(form.parts["text_encoder"].values()) == {None}
    assert form.psnr_db["mean"] >= 35
    assert form.psnr_db["worst"] >= 30
    for steps in (1, 4):
        exact, rounded = pictures(folder, "float32", steps), pictures(folder, "int8", steps)
        assert 0 < ((exact - rounded) ** 2).mean() <= 255**2 / 1e3, "30 dB, and not float32 by another name"


def test_layers_are_computed_in_bytes(folder: Path) -> None:
    form, core = read_int8(folder), shared_core()
    assert form is not None
    model, _space = read_index(folder)["decoder"].read(core, (1, *describe(folder).latent_shape))
    quantize(model, form.parts["decoder"])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    used = [node.get_rt_info()["runtimePrecision"].astype(str) for node in compiled.get_ordered_ops()]
    assert {"u8", "i8"} & set(used)


def test_a_batch_draws_what_each_draws_alone(folder: Path) -> None:
    engine = OpenVinoEngine(describe(folder), dtype="int8")
    prompts = [f"a red apple {i}" for i in range(9)]
    words = engine.encode(prompts)
    one = np.concatenate([engine.encode([prompt]).states for prompt in prompts])
    np.testing.assert_allclose(words.states, one, rtol=1e-4, atol=1e-4)
    latents = np.random.default_rng(0).standard_normal((9, *engine.info.latent_shape)).astype(np.float32)
    together = engine.denoise(latents, 999, words)
    alone = [engine.denoise(latents[i : i + 1], 999, Conditioning(words.states[i : i + 1], (0,))) for i in range(9)]
    # A sum in another order may fall on the other side of a rounding: one level of 255 in a few numbers.
    error = np.abs(together - np.concatenate(alone))
    assert error.mean() <= 1e-3 * np.abs(together).mean()


def test_float32_stays_and_is_the_default_without_instructions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OpenVinoEngine(describe(folder), dtype="float32").dtype == "float32"
    monkeypatch.setattr("onestill.engine.openvino.shared_weights.multiplies_int8", lambda has_bfloat16: True)
    assert OpenVinoEngine(describe(folder)).dtype == "int8"
    monkeypatch.setattr("onestill.engine.openvino.shared_weights.multiplies_int8", lambda has_bfloat16: False)
    assert OpenVinoEngine(describe(folder)).dtype != "int8"


def test_int8_is_not_for_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not multiplies_int8(has_bfloat16=True)


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core"])
def test_without_vnni_int8_is_refused(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = export_sd(describe(tiny_sd(tmp_path / "sd15", "sd15")), tmp_path / "int8", weights="int8")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for folder in (form, model_path("icons")):
        with pytest.raises(OnestillError, match="no VNNI, without which int8 draws wrong images; choose float32"):
            OpenVinoEngine(describe(folder), dtype="int8")
    assert StoredWeights(describe(form)).fastest_dtype(shared_core()) != "int8"
    with pytest.raises(OnestillError, match="leave out --int8"):
        export_openvino(tiny_model(tmp_path / "tiny", autoencoder="tiny", openvino=False), int8=True)


def test_a_model_without_the_form_says_so(copy: Path) -> None:
    (copy / FORM).unlink()
    with pytest.raises(OnestillError, match="no int8 form"):
        OpenVinoEngine(describe(copy), dtype="int8")
    assert OpenVinoEngine(describe(copy)).dtype in ("float32", "bfloat16")
    with pytest.raises(OnestillError, match="not 'int8'"):
        load_engine("torch", copy, dtype="int8")


@pytest.mark.parametrize("spoilt", ['{"format": 1}', '{"format": 9}', '{"format": 1, "parts": {"decoder": {"a": 3}}}'])
def test_a_spoilt_form_is_one_sentence(copy: Path, spoilt: str) -> None:
    (copy / FORM).write_text(spoilt)
    with pytest.raises(CheckpointError, match=r"int8"):
        OpenVinoEngine(describe(copy))


def test_a_layer_that_the_graph_lacks_is_named(copy: Path) -> None:
    form = json.loads((copy / FORM).read_text())
    form["parts"]["decoder"]["Convolution_x"] = [0, 1]
    (copy / FORM).write_text(json.dumps(form))
    with pytest.raises(CheckpointError, match="Convolution_x"):
        OpenVinoEngine(describe(copy), dtype="int8")


def test_a_network_that_draws_badly_stays_in_float32(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = json.loads((copy / FORM).read_text())["alone_psnr_db"]
    ordered = sorted(alone, key=lambda part: alone[part]["worst"])
    measure_little(monkeypatch)
    monkeypatch.setattr("onestill.export.calibrate.LEAST_WORST_DB", alone[ordered[0]]["worst"] + 0.5)
    kept = write_int8(describe(copy)).parts
    assert ordered[0] not in kept


def test_layers_at_the_inputs_and_of_one_row_stay_in_float32(folder: Path) -> None:
    model, _space = read_index(folder)["unet"].read(shared_core(), (1, *describe(folder).latent_shape))
    for node in layer_nodes(model).values():
        source = node.input_value(0)
        assert source.get_node().get_type_name() != "Parameter"
        assert len(source.get_shape()) > 2
