"""Captions and colours by rule."""

from __future__ import annotations

import random
import re

import pytest

from recipes.icons import captions, colours, everyday
from recipes.icons.everyday import everyday_names
from recipes.icons.splits import held_concepts
from tests.recipes.icon_rows import row

EMOJI = row("apple", "noto", "noto emoji", True, "#c33")
MONO = row("bus", "mdi", "solid", False, "currentColor")


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("cat", "a cat"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("scissors", "scissors"),
        ("bus", "a bus"),
        ("glass of milk", "a glass of milk"),
        ("rain", "rain"),
        ("flag of peru", "the flag of peru"),
        ("bell with a plus sign", "a bell with a plus sign"),
        ("people with bunny ears", "people with bunny ears"),
        ("two hearts", "two hearts"),
    ],
)
def test_articles(phrase: str, expected: str) -> None:
    assert captions.with_article(phrase) == expected


@pytest.mark.parametrize(
    ("one", "many"), [("cat", "cats"), ("red box", "red boxes"), ("cherry", "cherries"), ("key", "keys")]
)
def test_plurals(one: str, many: str) -> None:
    assert captions.plural(one) == many


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("man: red hair", "man with red hair"),
        ("woman: bald", "bald woman"),
        ("person running: facing right", "person running facing right"),
        ("family: man, woman, boy", "family, man, woman, boy"),
    ],
)
def test_emoji_names_become_phrases(phrase: str, expected: str) -> None:
    assert captions.phrase_of({**EMOJI, "phrase": phrase}) == expected


def test_a_one_colour_emoji_loses_its_colour_word() -> None:
    emoji = {**EMOJI, "phrase": "red apple"}
    assert captions.phrase_of(emoji) == "red apple"
    assert captions.phrase_of({**emoji, "palette": False}) == "apple"
    assert captions.phrase_of({**emoji, "palette": False, "phrase": "orange"}) == "orange"


def test_captions_are_deterministic_and_name_what_is_drawn() -> None:
    for seed in range(200):
        colour = captions.caption_colour(EMOJI, "teal", None, random.Random(seed))
        assert colour == captions.caption_colour(EMOJI, "teal", None, random.Random(seed))
        assert "apple" in colour
        assert "on a teal background" in colour
        assert "green apple" in captions.caption_colour(EMOJI, "white", "green", random.Random(seed))
        mono = captions.caption_mono(MONO, "red", "yellow", random.Random(seed))
        assert "red" in mono
        assert "yellow" in mono
        assert "bus" in mono or "thing" in mono


def test_the_canonical_form_is_the_commonest() -> None:
    said = [captions.caption_colour({**EMOJI, "keywords": []}, "white", None, random.Random(i)) for i in range(500)]
    assert max(set(said), key=said.count) == "an apple, noto emoji"


def test_shapes_are_named_plainly_half_of_the_time() -> None:
    star = {**MONO, "phrase": "star", "concept": "star"}
    said = [captions.caption_mono(star, "orange", "white", random.Random(i)) for i in range(300)]
    assert 0.45 < said.count("an orange star") / 300 < 0.75


def test_colour_pairs_are_apart_and_not_held_out() -> None:
    rng = random.Random(0)
    for i in range(300):
        concept = f"concept {i % 17}"
        foreground, background = colours.choose_pair([concept, "heart"], i % 2 == 0, rng)
        assert (background == "white") == (i % 2 == 0)
        assert colours.apart(foreground, background)
        assert not colours.held_pair(concept, foreground)
        assert foreground != "blue"
        assert not colours.held_colours(foreground, background)


def test_about_five_per_cent_of_pairs_are_held_out() -> None:
    pairs = [colours.held_pair(f"thing {i}", name) for i in range(300) for name in colours.COLOURS]
    assert 0.04 < sum(pairs) / len(pairs) < 0.06
    assert colours.held_pair("heart", "blue")
    assert all(colours.held_concepts("a", str(i)) == colours.held_concepts(str(i), "a") for i in range(50))


def test_people_s_names_stand_beside_the_official_ones() -> None:
    car = {**EMOJI, "phrase": "automobile", "concept": "car"}
    said = {captions.caption_colour(car, "white", None, random.Random(i)) for i in range(300)}
    assert {"a car, noto emoji", "an automobile, noto emoji"} <= said
    assert "a blue car, noto emoji" in {
        captions.caption_colour(car, "white", "blue", random.Random(i)) for i in range(300)
    }
    assert everyday_names("hot beverage", "@n1")[0] == "cup of coffee"
    assert everyday_names("rocket", "rocket") == ("space rocket", "spaceship")
    assert everyday_names("zebra", "zebra") == ()


def test_everyday_names_hold_nothing_held_out() -> None:
    held = re.compile(r"\b(" + "|".join(map(re.escape, held_concepts())) + r")(s|es)?\b")
    for official, names in everyday._table().items():
        assert held.search(official) or not any(held.search(name) for name in names), official
