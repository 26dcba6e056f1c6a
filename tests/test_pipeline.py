from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import onestill
from onestill.errors import (
    ImageError,
    NotFiniteError,
    OnestillError,
    OutputError,
    PromptError,
    ScheduleError,
    SizeError,
    StepsError,
)
from onestill.pipeline import Pipeline, load, save_picture
from onestill.pipeline.picture import fitted
from onestill.serve.provenance import read_provenance


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> Pipeline:
    return load(tiny_folder)


def array(image: Any) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_one_call_end_to_end(pipe: Pipeline) -> None:
    out = pipe(["a red apple", "a green heart"], seed=10, num_images_per_prompt=2)
    assert out.prompts == ["a red apple", "a red apple", "a green heart", "a green heart"]
    assert out.seeds == [10, 11, 12, 13]
    assert [(image.mode, image.size) for image in out.images] == [("RGB", (32, 32))] * 4
    assert out.notes == []
    times = out.timings
    assert 0 < times.encode_ms + times.denoise_ms + times.decode_ms <= times.total_ms
    assert min(times.encode_ms, times.denoise_ms, times.decode_ms) > 0


def test_a_seed_names_an_image_in_any_batch(pipe: Pipeline) -> None:
    many = pipe("a red apple", seed=3, num_images_per_prompt=21, num_inference_steps=2)
    for i in (0, 1, 20):
        alone = pipe("a red apple", seed=3 + i, num_inference_steps=2)
        assert np.abs(array(many.images[i]) - array(alone.images[0])).max() <= 1
    assert np.abs(array(many.images[0]) - array(many.images[1])).max() > 10


def test_without_a_seed_each_call_draws_something_else(pipe: Pipeline) -> None:
    first, second = pipe("a red apple"), pipe("a red apple")
    assert first.seeds != second.seeds
    again = pipe("a red apple", seed=first.seeds[0])
    np.testing.assert_array_equal(array(again.images[0]), array(first.images[0]))


def test_an_overlong_prompt_is_cut_and_that_is_said(pipe: Pipeline) -> None:
    out = pipe("red " * 40, seed=1)
    assert len(out.notes) == 1
    assert "last 26 tokens were cut" in out.notes[0]
    np.testing.assert_array_equal(array(out.images[0]), array(pipe("red " * 14, seed=1).images[0]))


def test_a_prompt_is_encoded_once_and_remembered(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(tiny_folder)
    encoded: list[str] = []
    encode = pipe.engine.encode

    def counted(prompts: Any) -> Any:
        encoded.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(pipe.engine, "encode", counted)
    monkeypatch.setattr("onestill.engine.prompt_cache.MOST_PROMPTS", 2)
    pipe(["red", "green", "red"], seed=1)
    pipe("green", seed=1)
    assert encoded == ["red", "green"]
    pipe("blue", seed=1)
    pipe(["green", "blue"], seed=1)
    assert encoded == ["red", "green", "blue"]
    pipe("red", seed=1)
    assert encoded == ["red", "green", "blue", "red"]


def test_guidance_and_negative_prompts_change_the_picture(pipe: Pipeline) -> None:
    def draw(**settings: Any) -> np.ndarray:
        return array(pipe("a red apple", seed=1, num_inference_steps=2, **settings).images[0])

    plain = draw()
    np.testing.assert_array_equal(draw(guidance_scale=1.0), plain)
    np.testing.assert_array_equal(draw(guidance_scale=1.0, negative_prompt="green"), plain)
    guided = draw(guidance_scale=4.0)
    assert np.abs(guided - plain).max() > 1
    assert np.abs(draw(guidance_scale=4.0, negative_prompt="green heart") - guided).max() > 0
    np.testing.assert_array_equal(draw(guidance_scale=4.0, negative_prompt=[""]), guided)


def test_a_negative_prompt_for_each_prompt(pipe: Pipeline) -> None:
    settings: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 2}
    out = pipe(
        ["a red apple", "a star"], seed=1, negative_prompt=["green", "blue"], num_images_per_prompt=2, **settings
    )
    alone = pipe("a star", seed=4, negative_prompt="blue", **settings)
    assert np.abs(array(out.images[3]) - array(alone.images[0])).max() <= 1
    with pytest.raises(PromptError, match="negative"):
        pipe(["a", "b"], negative_prompt=["c"], guidance_scale=2.0)


def test_image_to_image_stays_nearer_the_less_strength_it_has(pipe: Pipeline) -> None:
    white = PIL.Image.new("RGB", (32, 32), "white")
    words = pipe("a red apple", seed=1, num_inference_steps=4)
    weak, strong = (pipe("a red apple", seed=1, num_inference_steps=4, image=white, strength=s) for s in (0.1, 1.0))
    assert np.abs(array(weak.images[0]) - array(words.images[0])).max() > 5
    assert np.abs(array(strong.images[0]) - array(words.images[0])).max() <= 2, "pure noise keeps nothing of the image"


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.new("RGB", (100, 40), "red"),
        PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 0)),
        PIL.Image.new("L", (7, 300), 128),
        PIL.Image.new("P", (32, 32)),
        np.zeros((16, 24, 3), np.uint8),
    ],
    ids=["wide", "transparent", "grey", "palette", "array"],
)
def test_an_image_of_any_kind_and_size_is_fitted(pipe: Pipeline, image: Any) -> None:
    assert pipe("a red apple", image=image, seed=1).images[0].size == (32, 32)


def test_sixteen_bits_of_grey_are_not_cut_off() -> None:
    ramp = PIL.Image.fromarray(np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32))
    np.testing.assert_array_equal(fitted(ramp, 32, 32)[..., 0], np.asarray(ramp) // 256)


def test_transparent_means_white(pipe: Pipeline) -> None:
    clear, white = PIL.Image.new("RGBA", (32, 32), (9, 9, 9, 0)), PIL.Image.new("RGB", (32, 32), "white")
    drawn = [array(pipe("a star", image=image, seed=1, strength=0.3).images[0]) for image in (clear, white)]
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("image", ["picture.png", 3, np.zeros((4, 4, 9, 9), np.uint8), np.zeros((4, 4), np.complex128)])
def test_what_is_no_image_is_one_sentence(pipe: Pipeline, image: Any) -> None:
    with pytest.raises(ImageError, match="cannot be used"):
        pipe("a star", image=image)


@pytest.mark.parametrize(
    ("error", "settings"),
    [
        (PromptError, {"prompt": ""}),
        (PromptError, {"prompt": " \n\t"}),
        (PromptError, {"prompt": []}),
        (PromptError, {"prompt": ["a star", ""]}),
        (PromptError, {"prompt": 3}),
        (PromptError, {"prompt": [b"a star"]}),
        (PromptError, {"prompt": "x" * 10_001}),
        (PromptError, {"prompt": "a \ud800 star"}),
        (PromptError, {"negative_prompt": 3}),
        (SizeError, {"height": 64, "width": 64}),
        (SizeError, {"width": 0}),
        (SizeError, {"height": -32}),
        (StepsError, {"num_inference_steps": 0}),
        (StepsError, {"num_inference_steps": 51}),
        (StepsError, {"num_inference_steps": -1}),
        (StepsError, {"num_inference_steps": 1.5}),
        (StepsError, {"num_inference_steps": True}),
        (StepsError, {"num_images_per_prompt": 0}),
        (StepsError, {"num_images_per_prompt": 1001}),
        (StepsError, {"prompt": ["a star"] * 600, "num_images_per_prompt": 2}),
        (StepsError, {"guidance_scale": float("nan")}),
        (StepsError, {"guidance_scale": -1.0}),
        (StepsError, {"guidance_scale": 51.0}),
        (StepsError, {"guidance_scale": "much"}),
        (StepsError, {"seed": -1}),
        (StepsError, {"seed": 2**63}),
        (StepsError, {"seed": 1.0}),
        (StepsError, {"image": np.zeros((8, 8, 3), np.uint8), "strength": 0.0}),
        (StepsError, {"image": np.zeros((8, 8, 3), np.uint8), "strength": 1.1}),
        (ScheduleError, {"sampler": "eulr", "num_inference_steps": 2}),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(pipe: Pipeline, error: type[OnestillError], settings: dict[str, Any]) -> None:
    with pytest.raises(error) as caught:
        pipe(**{"prompt": "a star", **settings})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_size_error_names_the_sizes_there_are(pipe: Pipeline) -> None:
    with pytest.raises(SizeError, match="cannot draw 16x64 pixels; choose from 32x32"):
        pipe("a star", width=16, height=64)
    assert pipe("a star", seed=1, width=32).images[0].size == (32, 32)


def test_samplers_can_be_chosen(pipe: Pipeline) -> None:
    drawn = {
        name: array(pipe("a star", seed=1, num_inference_steps=4, sampler=name).images[0])
        for name in ("euler", "euler_ancestral", "ddim", "dpmpp_2m", "consistency")
    }
    np.testing.assert_array_equal(drawn["euler"], drawn["ddim"])
    assert np.abs(drawn["euler"] - drawn["euler_ancestral"]).max() > 1
    one = [array(pipe("a star", seed=1, sampler=name).images[0]) for name in drawn]
    assert all(np.abs(picture - one[0]).max() <= 1 for picture in one), "one step is one step"


# --- files ---


def test_a_saved_picture_carries_what_it_was_drawn_from(pipe: Pipeline, tmp_path: Path) -> None:
    out = pipe("a réd ☃ apple", seed=5, num_inference_steps=2)
    path = out.save(0, tmp_path / "new" / "apple.png")
    with PIL.Image.open(path) as image:
        text = image.text  # type: ignore[attr-defined]
        np.testing.assert_array_equal(array(image), array(out.images[0]))
    assert (text["prompt"], text["seed"], text["num_inference_steps"]) == ("a réd ☃ apple", "5", "2")
    assert (text["model"], text["version"]) == ("tiny 1", f"onestill {onestill.__version__}")
    assert text["parameters"].startswith("a réd ☃ apple\nSeed: 5, Steps: 2, ")
    assert [file.name for file in path.parent.iterdir()] == ["apple.png"]


@pytest.mark.parametrize("name", ["apple.jpg", "apple.JPEG", "apple.webp"])
def test_other_formats_carry_it_too(pipe: Pipeline, tmp_path: Path, name: str) -> None:
    path = pipe("a réd ☃ apple", seed=5).save(0, tmp_path / name)
    told = read_provenance(path)["parameters"]
    assert told.startswith("a réd ☃ apple\nSeed: 5")


def test_a_file_is_replaced_only_by_force(pipe: Pipeline, tmp_path: Path) -> None:
    first, second = pipe("a star", seed=1), pipe("a star", seed=2)
    path = first.save(0, tmp_path / "star.png")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        second.save(0, path)
    assert path.read_bytes() == before
    second.save(0, path, force=True)
    assert path.read_bytes() != before
    assert [file.name for file in tmp_path.iterdir()] == ["star.png"]


def test_a_picture_that_cannot_be_written_leaves_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    out = pipe("a star", seed=1)
    with pytest.raises(OutputError, match="does not end in"):
        out.save(0, tmp_path / "star.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        out.save(0, tmp_path / "file" / "star.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError):
        out.save(0, tmp_path / "folder.png", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_failed_encoder_leaves_nothing(tmp_path: Path) -> None:
    class Broken(PIL.Image.Image):
        def save(self, *arguments: Any, **options: Any) -> None:
            arguments[0].write(b"half")
            raise OSError(28, os.strerror(28))

    with pytest.raises(OutputError, match="No space left"):
        save_picture(Broken(), tmp_path / "star.png", {"prompt": "a star", "seed": "1"})
    assert list(tmp_path.iterdir()) == []


def test_each_image_may_have_a_seed_of_its_own(pipe: Pipeline) -> None:
    out = pipe("a red apple", seed=[9, 4, 9], num_images_per_prompt=3)
    assert out.seeds == [9, 4, 9]
    np.testing.assert_array_equal(array(out.images[0]), array(out.images[2]))
    assert np.abs(array(out.images[1]) - array(pipe("a red apple", seed=4).images[0])).max() <= 1
    for wrong in ([1, 2], [1, 2, -1], [1, 2, 0.5]):
        with pytest.raises(StepsError, match="seed"):
            pipe("a red apple", seed=wrong, num_images_per_prompt=3)


def test_a_pause_comes_before_each_stage_and_step_and_may_end_it(pipe: Pipeline) -> None:
    calls: list[int] = []
    pipe("a red apple", seed=1, num_inference_steps=3, pause=lambda: calls.append(len(calls)))
    assert len(calls) == 5

    def stop() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        pipe("a red apple", seed=1, pause=stop)


def test_numbers_that_are_not_finite_are_no_picture(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(tiny_folder)
    denoise = pipe.engine.denoise
    monkeypatch.setattr(pipe.engine, "denoise", lambda *inputs: denoise(*inputs) * np.float32("nan"))
    with pytest.raises(NotFiniteError, match="The model produced NaN or infinity"):
        pipe("a red apple", seed=1)
