"""Every engine against diffusers' own pipeline on the same folder, and against each other."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from onestill.checkpoint import describe, list_models, model_path
from onestill.engine.protocol import Conditioning, Engine
from onestill.errors import CheckpointError, MissingExtraError, ModelNotFoundError, OnestillError
from onestill.pipeline import Pipeline
from tests.on_cpu import load_engine, needs_vnni

PROMPTS = ["a red apple, fluent 3d emoji", "a green heart"]


@pytest.fixture(scope="module", params=["tiny-kl", "tiny-autoencoder", *list_models()])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tiny-kl":
        return Path(request.getfixturevalue("tiny_folder"))
    if request.param == "tiny-autoencoder":
        from tests.tiny import tiny_model

        return tiny_model(tmp_path_factory.mktemp("models") / "small", autoencoder="tiny")
    return model_path(request.param)


@pytest.fixture(scope="module")
def slow(folder: Path) -> Pipeline:
    return Pipeline(load_engine("torch", folder))


@pytest.fixture(scope="module")
def fast(folder: Path) -> Pipeline:
    return Pipeline(load_engine("openvino", folder, dtype="float32"))


def drawn_by_diffusers(folder: Path, steps: int, guidance_scale: float, seed: int) -> NDArray[np.float64]:
    """[B, H, W, 3] levels, drawn as a user of diffusers would."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of its own habits, in scheduler and pipeline
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(PROMPTS))]
        images = pipe(PROMPTS, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators).images
    return levels(images)


def levels(images: list[Any]) -> NDArray[np.float64]:
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])


def psnr(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Decibels; infinite for equal pictures."""
    error = ((a - b) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize(("steps", "guidance_scale"), [(1, 1.0), (4, 1.0), (3, 3.0)])
def test_engines_draw_what_diffusers_draws(
    folder: Path, slow: Pipeline, fast: Pipeline, steps: int, guidance_scale: float
) -> None:
    expected = drawn_by_diffusers(folder, steps, guidance_scale, seed=7)
    assert expected.std(axis=0).mean() > 1, "the two pictures must differ for this to mean anything"
    for pipe in (slow, fast):
        found = levels(pipe(PROMPTS, seed=7, num_inference_steps=steps, guidance_scale=guidance_scale).images)
        assert np.abs(found - expected).mean() <= 1, pipe.engine.name
        assert psnr(found, expected) >= 30, pipe.engine.name


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("dtype", "least_db"), [("bfloat16", 35), pytest.param("int8", 30, marks=needs_vnni)])
def test_a_shipped_model_in_less_than_float32_draws_nearly_the_same(
    name: str, steps: int, dtype: str, least_db: int
) -> None:
    exact, rounded = (
        levels(
            Pipeline(load_engine("openvino", model_path(name), dtype=dtype))(
                PROMPTS, seed=7, num_inference_steps=steps
            ).images
        )
        for dtype in ("float32", dtype)
    )
    for one, other in zip(exact, rounded, strict=True):
        assert psnr(one, other) >= least_db


def test_image_to_image_is_the_same_on_both_engines(slow: Pipeline, fast: Pipeline) -> None:
    picture = slow("a red apple", seed=1).images[0]
    found = [levels(pipe(PROMPTS, image=picture, strength=0.6, seed=1).images) for pipe in (slow, fast)]
    assert psnr(*found) >= 30


def test_the_words_matter(fast: Pipeline) -> None:
    pictures = levels([fast(prompt, seed=1).images[0] for prompt in PROMPTS])
    assert np.abs(pictures[0] - pictures[1]).max() > 0


def test_encoded_and_decoded_latents_have_the_shapes_and_types_of_the_protocol(slow: Pipeline, fast: Pipeline) -> None:
    for engine in (slow.engine, fast.engine):
        info = engine.info
        words = engine.encode([*PROMPTS, ""])
        assert words.states.dtype == np.float32
        assert words.states.shape[:2] == (3, info.max_tokens)
        latents = np.random.default_rng(0).standard_normal((3, *info.latent_shape)).astype(np.float32)
        output = engine.denoise(latents, 999, words)
        assert (output.dtype, output.shape) == (np.float32, latents.shape)
        pictures = engine.decode(latents)
        assert (pictures.dtype, pictures.shape) == (np.uint8, (3, info.height, info.width, 3))
        again = engine.encode_image(pictures)
        assert (again.dtype, again.shape) == (np.float32, latents.shape)


def test_a_batch_of_many_equals_its_images_alone(slow: Pipeline, fast: Pipeline) -> None:
    for engine in (slow.engine, fast.engine):
        latents = np.random.default_rng(0).standard_normal((11, *engine.info.latent_shape)).astype(np.float32)
        words = engine.encode([f"a red apple {i}" for i in range(11)])
        together = engine.denoise(latents, 999, words)
        alone = [
            engine.denoise(latents[i : i + 1], 999, Conditioning(words.states[i : i + 1], (0,))) for i in range(11)
        ]
        np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-4)


def test_the_given_arrays_are_not_changed(slow: Pipeline, fast: Pipeline) -> None:
    for engine in (slow.engine, fast.engine):
        latents = np.ones((1, *engine.info.latent_shape), np.float32)
        words = engine.encode(["a red apple"])
        states = words.states.copy()
        engine.denoise(latents, 999, words)
        engine.decode(latents)
        assert (latents == 1).all()
        np.testing.assert_array_equal(words.states, states)


# --- choosing an engine ---


def test_openvino_is_taken_where_the_model_has_that_form(tiny_folder: Path, tmp_path: Path) -> None:
    assert load_engine(None, tiny_folder).name == "openvino"
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    (folder / "onestill.json").unlink()
    shutil.rmtree(folder / "openvino")
    engine: Engine = load_engine(None, folder)
    assert (engine.name, engine.device, engine.dtype) == ("torch", "cpu", "float32")
    with pytest.raises(CheckpointError, match="no OpenVINO form"):
        load_engine("openvino", folder)


def test_what_is_not_to_be_had_is_one_sentence(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OnestillError, match="Did you mean 'openvino'"):
        load_engine("openvine", tiny_folder)
    with pytest.raises(ModelNotFoundError, match="nothing-like-it"):
        load_engine("openvino", "nothing-like-it")
    with pytest.raises(OnestillError, match="runs on 'cpu'"):
        load_engine("openvino", tiny_folder, device="cuda")
    with pytest.raises(OnestillError, match="float32, bfloat16, int8, not"):
        load_engine("openvino", tiny_folder, dtype="float16")
    with pytest.raises(OnestillError, match="no device 'nonsense'"):
        load_engine("torch", tiny_folder, device="nonsense")
    with pytest.raises(OnestillError, match="not 'int3'"):
        load_engine("torch", tiny_folder, dtype="int3")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onestill\[torch\]"):
        load_engine("torch", tiny_folder)


def test_torch_computes_in_bfloat16_too(tiny_folder: Path) -> None:
    full, half = (Pipeline(load_engine("torch", tiny_folder, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert psnr(levels(full(PROMPTS, seed=1).images), levels(half(PROMPTS, seed=1).images)) > 15


def test_weights_that_do_not_fit_their_config_are_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    (folder / "onestill.json").unlink()
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace("[\n    16,", "[\n    24,"))
    with pytest.raises(CheckpointError, match="do not fit"):
        load_engine("torch", folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("UNet2DConditionModel", "SomethingElse"))
    with pytest.raises(CheckpointError, match="SomethingElse"):
        load_engine("torch", folder)


def test_a_tokenizers_attention_mask_is_passed_only_where_the_config_asks(tiny_folder: Path, tmp_path: Path) -> None:
    from onestill.export.shared_weights import export_openvino

    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    (folder / "onestill.json").unlink()
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("{", '{"use_attention_mask": true,', 1))
    export_openvino(folder)
    assert describe(folder).use_attention_mask
    engines = [load_engine(name, folder, dtype="float32") for name in ("openvino", "torch")]
    with_mask = [engine.encode(PROMPTS).states for engine in engines]
    without = load_engine("torch", tiny_folder).encode(PROMPTS).states
    np.testing.assert_allclose(*with_mask, atol=1e-4)
    assert np.abs(with_mask[1] - without).max() > 1e-3
    expected = drawn_by_diffusers(folder, 1, 1.0, seed=3)
    assert np.abs(levels(Pipeline(engines[0])(PROMPTS, seed=3).images) - expected).mean() <= 1
