"""Real architectures at tiny width against diffusers' own pipelines: the same latents, the same picture."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

from onestill.errors import SizeError
from onestill.pipeline import Pipeline
from tests.on_cpu import load
from tests.tiny_sd import FAMILIES, single_file, tiny_sd

PROMPTS = ["a red apple on a table", "a green heart"]
# Of the largest latent, which is about 50 in these random models. The order of the sums in float32 differs between ours
# and diffusers' (other batches, other layouts), and every kind of CPU has another: 2e-6 with AVX-512, 3e-6 with AVX2.
LATENTS = 1e-5
LEVELS = 1  # of 255


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / family, family)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Pipeline:
    return load(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns of its own habits
        pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(ours: Pipeline, theirs: Any, steps: int, **settings: Any) -> tuple[Any, Any, Any, Any]:
    """Latents and levels, ours and diffusers', of the same prompts and seeds."""
    generators = [torch.Generator("cpu").manual_seed(3 + i) for i in range(len(PROMPTS))]
    options = {"num_inference_steps": steps, "generator": generators, **settings}
    options.setdefault("guidance_scale", 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latents = theirs(PROMPTS, output_type="latent", **options).images
        with torch.no_grad():
            image = theirs.vae.decode(latents / theirs.vae.config.scaling_factor, return_dict=False)[0]
        pictures = theirs.image_processor.postprocess(image.detach(), output_type="np")
    expected = (pictures * 255).round().astype(np.int16)
    settings.pop("image", None)
    kept = []
    decode = ours.engine.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.engine, "decode", lambda latents: kept.append(latents) or decode(latents))
        found = ours(PROMPTS, seed=3, num_inference_steps=steps, **settings)
    return np.concatenate(kept), latents.numpy(), levels(found.images), expected


def off(found: Any, expected: Any) -> float:
    """The largest difference, in parts of the largest value expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def levels(images: list[Any]) -> Any:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_text_to_image_is_diffusers_own(ours: Pipeline, theirs: Any, steps: int) -> None:
    latents, expected_latents, pictures, expected = both(ours, theirs, steps)
    assert np.abs(expected[0] - expected[1]).mean() > 1, "the two pictures must differ for this to mean anything"
    assert off(latents, expected_latents) <= LATENTS
    assert np.abs(pictures - expected).max() <= LEVELS


def test_guidance_and_negative_prompts_are_diffusers_own(ours: Pipeline, theirs: Any) -> None:
    for negative in (None, "a blue star"):
        negatives = None if negative is None else [negative] * 2
        latents, expected_latents, *_ = both(ours, theirs, 2, guidance_scale=2.5, negative_prompt=negatives)
        assert off(latents, expected_latents) <= LATENTS


def test_other_sizes_are_diffusers_own_and_noted(ours: Pipeline, theirs: Any) -> None:
    latents, expected_latents, *_ = both(ours, theirs, 1, height=72, width=104)
    assert off(latents, expected_latents) <= LATENTS
    (note,) = ours("a", seed=1, height=72, width=104).notes
    assert "trained to draw" in note
    assert ours("a", seed=1).notes == []


def test_sizes_that_sdxl_is_told_are_diffusers_own(ours: Pipeline, theirs: Any, family: str) -> None:
    told = {"original_size": (512, 96), "crops_coords_top_left": (32, 8), "target_size": (128, 64)}
    if family != "sdxl":
        with pytest.raises(SizeError, match=r"original_size is \(1, 2, 3\)"):
            ours("a", original_size=(1, 2, 3))  # type: ignore[arg-type]
        return
    plain, *_ = both(ours, theirs, 1)
    latents, expected, *_ = both(ours, theirs, 1, **told)
    assert off(latents, expected) <= LATENTS
    assert off(latents, plain) > 10 * LATENTS, "being told must do something for this to mean anything"


def test_less_than_one_step_of_a_picture_becomes_one_and_that_is_said(ours: Pipeline) -> None:
    picture = PIL.Image.new("RGB", (64, 64), "orange")
    start = np.asarray(picture, dtype=np.int16)
    far = []
    for strength in (0.3, 0.9):
        out = ours("a red apple", image=picture, strength=strength, num_inference_steps=1, seed=1)
        assert any(f"A strength of {strength:g} is less than one of 1 steps; one was taken" in one for one in out.notes)
        far.append(np.abs(np.asarray(out.images[0], dtype=np.int16) - start).mean())
    assert far[0] != far[1], "strength must act below one step too"
    whole = ours("a red apple", image=picture, strength=0.5, num_inference_steps=2, seed=1)
    assert not any("less than one" in note for note in whole.notes)


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.5), (4, 0.75), (4, 1.0)])
def test_image_to_image_is_diffusers_own(ours: Pipeline, theirs: Any, family: str, steps: int, strength: float) -> None:
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if family == "sdxl" else diffusers.StableDiffusionImg2ImgPipeline
    options = {} if family == "sdxl" else {"requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind(**theirs.components, **options)
    pipe.set_progress_bar_config(disable=True)
    rows = np.linspace(0, 255, info_side := ours.info.height).astype(np.uint8)
    picture = np.stack(
        [np.tile(rows, (info_side, 1)), np.tile(rows[:, None], (1, info_side)), np.zeros((64, 64), np.uint8)], -1
    )
    start = ours.engine.encode_image(picture[None])
    generators = [torch.Generator("cpu").manual_seed(3 + i) for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Given as latents, so that both start from the same: diffusers draws the autoencoder's noise, we take its mode.
        expected = pipe(
            PROMPTS,
            image=torch.from_numpy(start).repeat(2, 1, 1, 1),
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=generators,
            output_type="latent",
        ).images
    kept = []
    decode = ours.engine.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.engine, "decode", lambda latents: kept.append(latents) or decode(latents))
        ours(PROMPTS, image=picture, strength=strength, num_inference_steps=steps, seed=3)
    assert off(kept[0], expected.numpy()) <= LATENTS


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.5), (4, 0.75), (4, 0.99)])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_inpainting_is_diffusers_own(
    ours: Pipeline, theirs: Any, family: str, steps: int, strength: float, guidance_scale: float
) -> None:
    """Legacy blending, as diffusers' pipelines do it for UNets of four channels.

    At strength 1 they start from noise alone; ours starts from the noised image, as image to image does.
    """
    kind = diffusers.StableDiffusionXLInpaintPipeline if family == "sdxl" else diffusers.StableDiffusionInpaintPipeline
    options = {} if family == "sdxl" else {"requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind(**theirs.components, **options)
    pipe.set_progress_bar_config(disable=True)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:56] = 255
    start = torch.from_numpy(ours.engine.encode_image(picture[None])).repeat(2, 1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pipe(
            PROMPTS,
            image=start,
            masked_image_latents=start,
            mask_image=PIL.Image.fromarray(mask),
            height=64,
            width=64,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(3 + i) for i in range(2)],
            output_type="latent",
        ).images.numpy()
    kept = []
    decode = ours.engine.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.engine, "decode", lambda latents: kept.append(latents) or decode(latents))
        settings: dict[str, Any] = {"strength": strength, "num_inference_steps": steps, "seed": 3}
        ours(PROMPTS, image=picture, mask=mask, guidance_scale=guidance_scale, **settings)
    assert np.abs(kept[0] - expected).max() <= LATENTS * guidance_scale


def test_a_folder_and_a_single_file_draw_the_same_picture(
    ours: Pipeline, folder: Path, family: str, tmp_path: Path
) -> None:
    path = single_file(folder, tmp_path / "model.safetensors", family, notes={"modelspec.resolution": "64x64"})
    single = load(path, preset="lcm" if family == "sd15" else None)
    assert single.info.family == ours.info.family
    assert (single.info.height, single.info.width, single.info.num_inference_steps) == (
        64,
        64,
        4 if family == "sd15" else 1,
    )
    for steps in (1, 2):
        expected = levels(ours(PROMPTS, seed=5, num_inference_steps=steps).images)
        found = levels(single(PROMPTS, seed=5, num_inference_steps=steps).images)
        assert np.abs(found - expected).max() <= LEVELS
    image = PIL.Image.new("RGB", (64, 64), "orange")
    settings: dict[str, Any] = {"image": image, "strength": 0.5, "num_inference_steps": 2, "seed": 1}
    assert np.abs(levels(single("a", **settings).images) - levels(ours("a", **settings).images)).max() <= LEVELS
