from __future__ import annotations

import numpy as np
import pytest

from onestill.errors import ImageError
from onestill.evaluate.colour import ColourTest, colour_accuracy, colour_prompts, foreground, named_colour
from tests.evaluate.shapes import Painter, shape

BLUE = (45, 110, 225)


@pytest.mark.parametrize("colour", ["red", "green", "blue", "yellow", "purple", "black", "orange", "brown", "pink"])
@pytest.mark.parametrize("background", [(255, 255, 255), (250, 248, 250), (60, 205, 225)])
def test_the_fill_of_a_shape_is_its_colour(colour: str, background: tuple[int, int, int]) -> None:
    assert named_colour(shape(colour, "square", background=background)) == colour


def test_shades_count_for_their_family() -> None:
    assert named_colour(shape("dark red")) == "red"
    assert named_colour(shape("navy")) == "blue"
    assert named_colour(shape("lavender")) == "purple"


def test_a_noisy_shaded_ball_is_still_red() -> None:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    light = np.clip(0.55 + 0.5 * (-x - y) / 2, 0, 1)[..., None]
    ball = np.where((x**2 + y**2 < 0.7)[..., None], light * np.array([245, 60, 60]), 255.0)
    noise = np.random.default_rng(0).normal(0, 4, ball.shape)
    assert named_colour((ball + noise).clip(0, 255).astype(np.uint8)) == "red"


def test_an_outline_does_not_outweigh_the_fill() -> None:
    assert named_colour(shape("yellow", "square", outline=(20, 20, 22), size=64)) == "yellow"


def test_the_background_does_not_count_however_large() -> None:
    assert named_colour(shape("red", background=BLUE, radius=0.1)) == "red"


def test_a_shape_that_fills_the_picture_keeps_its_colour() -> None:
    assert named_colour(np.full((32, 32, 3), (218, 40, 45), np.uint8)) == "red"
    assert named_colour(shape("green", "square", radius=0.6)) == "green"


def test_an_empty_picture_has_no_colour() -> None:
    blank = np.full((32, 32, 3), 253, np.uint8)
    assert named_colour(blank) is None
    assert not foreground(blank).any()


def test_a_busy_border_hides_nothing() -> None:
    picture = shape("red", "square").copy()
    picture[:1] = np.random.default_rng(0).integers(0, 256, (1, 32, 3))
    picture[:, :1] = np.random.default_rng(1).integers(0, 256, (32, 1, 3))
    picture[-1:] = np.random.default_rng(2).integers(0, 256, (1, 32, 3))
    assert named_colour(picture) == "red"


def test_only_pictures_are_judged() -> None:
    with pytest.raises(ImageError, match="float64"):
        named_colour(np.zeros((8, 8, 3)))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"\[8, 8\]"):
        named_colour(np.zeros((8, 8), np.uint8))


def test_the_default_test_is_25_prompts_of_4_seeds() -> None:
    pairs = colour_prompts()
    assert len(set(pairs)) == 25
    assert ("a purple triangle", "purple") in pairs
    accuracy, verdicts, pictures = colour_accuracy(Painter())
    assert accuracy == 1
    assert pictures.shape == (100, 32, 32, 3)
    assert [verdict.seed for verdict in verdicts[:5]] == [0, 1, 2, 3, 0]


def test_mistakes_are_counted() -> None:
    accuracy, verdicts, _ = colour_accuracy(Painter(mistakes=0.5), seeds=range(40))
    assert 0.4 < accuracy < 0.72  # a mistaken colour is still the right one in 1 of 8
    assert accuracy == np.mean([verdict.asked == verdict.seen for verdict in verdicts])
    assert colour_accuracy(lambda p, s: np.full((len(p), 8, 8, 3), 255, np.uint8), test=ColourTest(("red",)))[0] == 0
