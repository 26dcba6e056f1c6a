"""A mask: what is drawn, what stays, and how a mask may be given; on both engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from onestill.engine import TorchOptions
from onestill.errors import ImageError, StepsError
from onestill.pipeline import Pipeline
from onestill.pipeline.watch import partial_steps
from onestill.sampling import SAMPLERS
from tests.on_cpu import load

EMPTY_NOTE = "The mask keeps the whole image"


@pytest.fixture(scope="module", params=["openvino", "torch", "torch, end to end"])
def pipe(request: pytest.FixtureRequest, tiny_folder: Path) -> Pipeline:
    if request.param == "openvino":
        return load(tiny_folder, engine="openvino", dtype="float32", threads=1)
    options = TorchOptions() if "end" in request.param else None
    return load(tiny_folder, engine="torch", device="cpu", options=options)


def array(image: Any) -> Any:
    return np.asarray(image, dtype=np.int16)


@pytest.fixture(scope="module")
def picture() -> Any:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (32, 32, 3), dtype=np.uint8)


def left_half() -> Any:
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    return mask


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_outside_the_mask_are_the_images_own_pixels(pipe: Pipeline, picture: Any, steps: int, strength: float) -> None:
    out = pipe(
        ["a red apple", "a star"], image=picture, mask=left_half(), strength=strength, num_inference_steps=steps, seed=1
    )
    for drawn in out.images:
        np.testing.assert_array_equal(array(drawn)[:, 16:], picture[:, 16:])
        assert np.abs(array(drawn)[:, :16] - picture[:, :16]).mean() > 5
    assert np.abs(array(out.images[0]) - array(out.images[1]))[:, :16].max() > 5
    assert out.metadata(0)["mask"] == "yes"


def test_inside_the_mask_are_the_latents_of_image_to_image(
    tiny_pipe: Pipeline, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    decode = tiny_pipe.engine.decode
    monkeypatch.setattr(tiny_pipe.engine, "decode", lambda latents: kept.append(latents) or decode(latents))
    settings: dict[str, Any] = {"image": picture, "strength": 1.0, "seed": 4}
    tiny_pipe("a red apple", **settings)
    tiny_pipe("a red apple", mask=left_half(), **settings)
    whole, part = kept
    np.testing.assert_array_equal(part[..., :2], whole[..., :2])  # one step: the network saw the same
    np.testing.assert_array_equal(part[..., 2:], tiny_pipe.engine.encode_image(picture[None])[..., 2:])


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_full_mask_is_image_to_image(pipe: Pipeline, picture: Any, sampler: str) -> None:
    settings: dict[str, Any] = {"image": picture, "num_inference_steps": 4, "sampler": sampler, "seed": 2}
    for strength in (0.5, 1.0):
        whole = pipe("a red apple", strength=strength, **settings)
        masked = pipe("a red apple", strength=strength, mask=np.full((32, 32), 255, np.uint8), **settings)
        np.testing.assert_array_equal(array(masked.images[0]), array(whole.images[0]))


def test_an_empty_mask_gives_the_image(pipe: Pipeline, picture: Any) -> None:
    out = pipe("a red apple", image=picture, mask=np.zeros((32, 32), np.uint8), num_inference_steps=3, seed=1)
    np.testing.assert_array_equal(array(out.images[0]), picture)
    assert any(EMPTY_NOTE in note for note in out.notes)
    half = pipe("a red apple", image=picture, mask=left_half(), seed=1)
    assert not any(EMPTY_NOTE in note for note in half.notes)


def test_the_engines_agree(tiny_folder: Path, picture: Any) -> None:
    pipes = [
        load(tiny_folder, engine="openvino", dtype="float32", threads=1),
        load(tiny_folder, engine="torch", device="cpu"),
        load(tiny_folder, engine="torch", device="cpu", options=TorchOptions()),
    ]
    for sampler in sorted(SAMPLERS):
        settings: dict[str, Any] = {"num_inference_steps": 3, "sampler": sampler, "strength": 1.0, "seed": 1}
        found = [array(one(["a star", "a heart"], image=picture, mask=left_half(), **settings).images) for one in pipes]
        assert np.abs(found[0] - found[1]).max() <= 2
        assert np.abs(found[1] - found[2]).max() <= 1


def transparent(draws: Any, colour: int = 128) -> PIL.Image.Image:
    alpha = PIL.Image.fromarray(255 - draws)
    image = PIL.Image.new("RGB", alpha.size, (colour, colour, colour))
    image.putalpha(alpha)
    return image


FORMS: dict[str, Callable[[Any], Any]] = {
    "transparent": transparent,
    "transparent and black": lambda draws: transparent(draws, 0),
    "transparent and white": lambda draws: transparent(draws, 255),
    "grey and transparent": lambda draws: transparent(draws).convert("LA"),
    "white": PIL.Image.fromarray,
    "white, RGB": lambda draws: PIL.Image.fromarray(draws).convert("RGB"),
    "white, one bit": lambda draws: PIL.Image.fromarray(draws).convert("1"),
    "white, palette": lambda draws: PIL.Image.fromarray(draws).convert("P"),
    "booleans": lambda draws: draws > 0,
    "array": lambda draws: draws,
    "array with alpha": lambda draws: np.asarray(transparent(draws)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_any_form(tiny_pipe: Pipeline, picture: Any, form: str) -> None:
    expected = tiny_pipe("a star", image=picture, mask=left_half(), seed=1).images[0]
    found = tiny_pipe("a star", image=picture, mask=FORMS[form](left_half()), seed=1).images[0]
    np.testing.assert_array_equal(array(found), array(expected))


def test_a_mask_is_cut_and_turned_as_its_image(tiny_pipe: Pipeline) -> None:
    random = np.random.default_rng(0)
    image = PIL.Image.fromarray(random.integers(0, 256, (40, 20, 3), dtype=np.uint8))
    mask = PIL.Image.new("L", (20, 40))
    mask.paste(255, (0, 0, 20, 20))  # the upper half
    drawn = array(tiny_pipe("a star", image=image, mask=mask, seed=1).images[0])
    plain = array(tiny_pipe("a star", image=image, mask=PIL.Image.new("L", (20, 40)), seed=1).images[0])
    changed = np.abs(drawn - plain).max((1, 2)) > 0
    assert changed[:14].all()
    assert not changed[20:].any()
    turned = mask.rotate(-90, expand=True)  # 40 x 20, which its orientation turns back
    turned.getexif()[0x0112] = 8
    np.testing.assert_array_equal(array(tiny_pipe("a star", image=image, mask=turned, seed=1).images[0]), drawn)


def test_half_a_mask_mixes(tiny_pipe: Pipeline, picture: Any) -> None:
    settings: dict[str, Any] = {"image": picture, "seed": 1}
    full, half = (
        array(tiny_pipe("a star", mask=np.full((32, 32), level, np.uint8), **settings).images[0])
        for level in (255, 128)
    )
    np.testing.assert_allclose(half, picture + (full - picture) * (128 / 255), atol=0.51)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": np.zeros((32, 32), np.uint8)}, "needs the image"),
        (
            {"mask": np.zeros((16, 32), np.uint8), "image": PIL.Image.new("RGB", (32, 32))},
            "32x16 and the image 32x32 pixels",
        ),
        ({"mask": "mask.png", "image": PIL.Image.new("RGB", (32, 32))}, "The mask cannot be used"),
    ],
)
def test_a_mask_that_cannot_be_used(tiny_pipe: Pipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        tiny_pipe("a star", seed=1, **given)


# --- partial images -------------------------------------------------------------------------------------------------


def test_partial_images_are_spread_over_the_steps() -> None:
    assert partial_steps(3, 4) == (1, 2, 3)
    assert partial_steps(1, 4) == (2,)
    assert partial_steps(3, 10) == (2, 5, 7)
    assert partial_steps(3, 2) == (1,)
    assert partial_steps(3, 1) == partial_steps(0, 9) == ()
    for wrong in (-1, 0.5, True):
        with pytest.raises(StepsError, match="partial_images"):
            partial_steps(wrong, 4)  # type: ignore[arg-type]


def test_a_partial_image_is_the_estimate_of_its_step(pipe: Pipeline) -> None:
    """With Euler, the estimate after step i of many is what sampling would end with if it stopped there."""
    shown: dict[tuple[int, int], Any] = {}

    def keep(index: int, partial: int, image: Any) -> None:
        assert (index, partial) not in shown
        shown[index, partial] = array(image)

    settings: dict[str, Any] = {"num_inference_steps": 4, "sampler": "euler", "seed": 1}
    prompts = ["a red apple", "a star"]
    out = pipe(prompts, partial_images=3, on_partial=keep, **settings)
    plain = pipe(prompts, **settings)
    assert sorted(shown) == [(image, partial) for image in (0, 1) for partial in (0, 1, 2)]
    one_step = pipe(prompts, num_inference_steps=1, sampler="euler", seed=1)  # the same first call of the network
    for i in range(2):
        assert np.abs(array(out.images[i]) - array(plain.images[i])).max() <= 1
        assert np.abs(shown[i, 0] - array(one_step.images[i])).max() <= 1
        assert np.abs(shown[i, 2] - array(out.images[i])).mean() > 0.1
    assert out.notes == plain.notes


def test_partial_images_of_many_and_of_one_step(tiny_pipe: Pipeline, picture: Any) -> None:
    shown: list[tuple[int, int]] = []

    def keep(index: int, partial: int, image: Any) -> None:
        np.testing.assert_array_equal(array(image)[:, 16:], picture[:, 16:])
        shown.append((index, partial))

    settings: dict[str, Any] = {"on_partial": keep, "image": picture, "mask": left_half(), "strength": 1.0, "seed": 1}
    tiny_pipe("a star", num_images_per_prompt=18, partial_images=1, num_inference_steps=2, **settings)
    assert sorted(shown) == [(index, 0) for index in range(18)]
    shown.clear()
    out = tiny_pipe("a star", partial_images=2, num_inference_steps=1, **settings)
    assert (shown, out.notes) == (
        [],
        ["2 partial images were asked for and none shown: one comes after each step but the last."],
    )


def test_drawing_ends_between_partial_images(tiny_pipe: Pipeline) -> None:
    class Enough(Exception):
        pass

    calls = []

    def pause() -> None:
        calls.append(len(calls))
        if len(calls) == 3:  # before the first partial image is decoded
            raise Enough

    with pytest.raises(Enough):
        tiny_pipe(
            "a star", num_inference_steps=3, partial_images=2, on_partial=lambda *_: pytest.fail("shown"), pause=pause
        )


@pytest.fixture(scope="module")
def tiny_pipe(tiny_folder: Path) -> Pipeline:
    return load(tiny_folder, engine="openvino", dtype="float32", threads=1)


def test_a_mask_stays_in_float32(picture: Any, tiny_folder: Path) -> None:
    """Half precision is the networks' business: what stays of an image is exact."""
    half = load(tiny_folder, engine="torch", device="cpu", dtype="bfloat16")
    out = half("a star", image=picture, mask=left_half(), num_inference_steps=2, seed=1)
    np.testing.assert_array_equal(array(out.images[0])[:, 16:], picture[:, 16:])
    assert torch.get_default_dtype() == torch.float32
