"""The fast torch engine against its slow twin. Without a GPU its functions are called in the open, not as graphs."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from onestill.checkpoint import cache_folder
from onestill.engine.protocol import TorchOptions
from onestill.engine.torch.fast import FastEngine
from onestill.errors import MissingExtraError, NotFiniteError, OnestillError
from onestill.pipeline import Pipeline
from tests.on_cpu import load, load_engine
from tests.tiny_sd import FAMILIES, tiny_sd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = ["a red apple", "a green heart", "a bicycle"]
LEVELS = 1 if DEVICE == "cpu" else 3  # of 255; a GPU's kernels differ with the batch
TF32_LEVELS = 2 * LEVELS  # where products are in TF32 too, not only convolutions


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / str(request.param), str(request.param))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl")


def fast(folder: Path, **options: Any) -> Pipeline:
    return load(folder, engine="torch", device=DEVICE, dtype="float32", options=TorchOptions(**options))


def levels(pipe: Pipeline, prompts: Any = tuple(PROMPTS), **settings: Any) -> Any:
    return np.stack([np.asarray(image, dtype=np.int16) for image in pipe(list(prompts), seed=7, **settings).images])


def test_words_to_pixels_equals_the_slow_way(folder: Path) -> None:
    slow, quick = load(folder), fast(folder)
    image = PIL.Image.new("RGB", (64, 64), "orange")
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (8, 0, 40, 64))
    for settings in (
        {"num_inference_steps": 1},
        {"num_inference_steps": 3},
        {"num_inference_steps": 2, "guidance_scale": 2.0},
        {"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "a blue star"},
        {"num_inference_steps": 2, "image": image, "strength": 0.5},
        {"num_inference_steps": 3, "image": image, "strength": 1.0, "mask": mask},
        {"num_inference_steps": 2, "image": image, "strength": 1.0, "mask": mask, "guidance_scale": 2.0},
        {"num_inference_steps": 1, "height": 72, "width": 80},
    ):
        assert np.abs(levels(slow, **settings) - levels(quick, **settings)).max() <= LEVELS, settings


def test_an_image_is_the_same_in_every_bucket(xl: Path) -> None:
    quick = fast(xl)
    many = quick(PROMPTS[0], seed=3, num_images_per_prompt=11).images
    for i in (0, 5, 10):
        alone = quick(PROMPTS[0], seed=3 + i).images[0]
        difference = np.abs(np.asarray(alone, dtype=np.int16) - np.asarray(many[i], dtype=np.int16))
        assert difference.max() <= LEVELS


def test_timings_and_notes_come_with_it(xl: Path) -> None:
    out = fast(xl)("red " * 100, seed=1)
    assert min(out.timings.encode_ms, out.timings.denoise_ms, out.timings.decode_ms) > 0
    assert "last 25 tokens were cut, from 'red red" in out.notes[0]


def test_words_are_encoded_once_and_forgotten_in_turn(xl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.engine.prompt_cache.MOST_PROMPTS", 2)
    quick = fast(xl)
    cache: Any = quick.engine._prompts  # type: ignore[attr-defined]
    remembered: list[str] = []
    remember = cache._encode
    monkeypatch.setattr(cache, "_encode", lambda prompts: remembered.extend(prompts) or remember(prompts))
    for prompt in ("red", "green", "red", "blue", "red", "green"):
        quick(prompt, seed=1)
    assert remembered == ["red", "green", "blue", "green"]


@pytest.mark.parametrize("options", [{"channels_last": True}, {"fuse": True}, {"attention": "math"}], ids=str)
def test_no_option_changes_the_picture(xl: Path, options: dict[str, Any]) -> None:
    assert np.abs(levels(load(xl)) - levels(fast(xl, **options))).max() <= LEVELS


@pytest.fixture
def inductor() -> Iterator[None]:
    """Without what inductor warns of, as here a warning is an error: its own import, and products not in TF32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._inductor.compile_fx
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("inductor")
def test_inductor_does_not_warn_of_the_precision_that_compiling_is_tested_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.compile_fx import _warn_tf32_disabled

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    _warn_tf32_disabled.__wrapped__()
    torch.set_float32_matmul_precision("highest")
    with pytest.warns(UserWarning, match="TensorFloat32"):
        _warn_tf32_disabled.__wrapped__()


@pytest.mark.gpu  # on a CPU it takes minutes of compiling C++
@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_compiled_blocks_draw_the_same_and_leave_a_cache(xl: Path) -> None:
    expected = levels(load(xl, engine="torch", device=DEVICE, dtype="float32"))
    assert np.abs(expected - levels(fast(xl, compile="regional"))).max() <= TF32_LEVELS
    assert list((cache_folder() / "torch").glob("*.bin"))
    assert np.abs(expected - levels(fast(xl, compile="regional"))).max() <= TF32_LEVELS


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_int8_layers_change_the_picture_a_little(xl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr("onestill.engine.torch.compiling.LEAST_WIDTH", 64)
    quick = fast(xl, quantize="int8", compile="none" if DEVICE == "cpu" else "regional")
    difference = np.abs(levels(load(xl)) - levels(quick))
    assert 0 < difference.mean() < 8


def test_options_that_cannot_be_had_are_one_sentence(xl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"compile": "hole"}, "Did you mean 'whole'"),
        ({"quantize": "int3"}, "choose from none, int8, fp8"),
        ({"attention": "flashy"}, "Did you mean 'flash'"),
    ):
        with pytest.raises(OnestillError, match=message):
            fast(xl, **options)
    if DEVICE == "cpu":
        with pytest.raises(OnestillError, match="'fp8' needs a GPU"):
            fast(xl, quantize="fp8")
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(MissingExtraError, match=r"onestill\[fast\]"):
        load_engine("torch", xl, options=TorchOptions(quantize="int8"))


# --- overflow ---


def spoilt(pipe: Pipeline, value: float) -> Pipeline:
    """The same pipeline, whose decoder's last layer adds a number that its type cannot hold."""
    engine: Any = pipe.engine
    decoder = engine._networks.latent_space.decoder
    decoder.to(torch.float16)
    with torch.no_grad():
        decoder.decoder.conv_in.weight *= value
    return pipe


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_decoder_that_overflows_is_decoded_again_and_that_is_said(xl: Path, is_fast: bool) -> None:
    pipe = spoilt(fast(xl) if is_fast else load(xl, device=DEVICE, dtype="float32"), 1e4)
    with pytest.warns(RuntimeWarning, match=r"overflowed float16.*decoded in float32"):
        found = np.asarray(pipe("a red apple", seed=1).images[0])
    assert found.std() > 1, "neither black nor one colour"


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_model_without_numbers_never_draws_black(xl: Path, is_fast: bool) -> None:
    pipe = fast(xl) if is_fast else load(xl, device=DEVICE, dtype="float32")
    engine: Any = pipe.engine
    with torch.no_grad():
        engine._networks.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(NotFiniteError, match="The model produced NaN or infinity: the latents"):
        pipe("a red apple", seed=1)


# --- threads and memory ---


@pytest.mark.parametrize("is_fast", [False, True])
def test_eight_threads_draw_what_each_would_alone(xl: Path, is_fast: bool) -> None:
    pipe = fast(xl) if is_fast else load(xl, engine="torch")
    prompts = [f"a {colour} {thing}" for colour in ("red", "green", "blue", "white") for thing in ("apple", "star")]
    alone = {(prompt, seed): levels_of(pipe, prompt, seed) for prompt in prompts for seed in range(2)}
    wrong: list[tuple[str, int]] = []

    def ask(thread: int) -> None:
        for i in range(20):
            prompt, seed = prompts[(3 * thread + i) % len(prompts)], (thread + i) % 2
            if np.abs(levels_of(pipe, prompt, seed) - alone[prompt, seed]).max() > LEVELS:
                wrong.append((prompt, seed))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def levels_of(pipe: Pipeline, prompt: str, seed: int) -> Any:
    return np.asarray(pipe(prompt, seed=seed).images[0], dtype=np.int16)


@pytest.mark.gpu
def test_every_graph_equals_its_eager_twin(folder: Path) -> None:
    graphed, eager = fast(folder), fast(folder, graphs=False)
    for steps in (1, 2, 4):
        for count in (1, 3, 8):
            settings = {"num_inference_steps": steps, "num_images_per_prompt": count}
            for _ in range(3):  # as it is, recorded, replayed
                found, expected = (levels(pipe, PROMPTS[:1], **settings) for pipe in (graphed, eager))
                assert np.abs(found - expected).max() <= 2
    assert graphed.engine._sampler.graphs == graphed.engine._decoder.graphs * 3 == 9  # type: ignore[attr-defined]


def test_the_fast_engine_is_taken_on_a_gpu(xl: Path) -> None:
    assert isinstance(load_engine("torch", xl, options=TorchOptions()), FastEngine)
    assert isinstance(load_engine("torch", xl, device=DEVICE), FastEngine) == (DEVICE == "cuda")
    with pytest.raises(dataclasses.FrozenInstanceError):
        TorchOptions().graphs = False  # type: ignore[misc]
