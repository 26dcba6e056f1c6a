"""From rows to shards: the mix, the drawing, and that nothing held out reaches training."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from onestill.data import ShardReader, sample_shards
from recipes.icons import colours, render
from recipes.icons.drawing import draw_colour, draw_composition, draw_mono, geometry, rasterise, recoloured
from recipes.icons.mix import SHARES, Mix, mark_default_look
from recipes.icons.notice import credits_of
from recipes.icons.sample_set import write_notice, write_sample_set
from recipes.icons.shapes import shape_rows
from recipes.icons.splits import held_concepts
from recipes.icons.table import Icon, write_table
from tests.recipes.icon_rows import icon_rows, row, word_tokenizer

CREDIT = {
    name: {"name": name.title(), "author": f"the {name} people", "licence": "MIT"}
    for name in ("noto", "twemoji", "fluent-emoji-flat", "icon-park", "mdi", "tabler")
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> render.Plan:
    folder = tmp_path_factory.mktemp("icons")
    fields = {field.name for field in dataclasses.fields(Icon)}
    icons = [Icon(source="emoji", **{k: v for k, v in r.items() if k in fields}) for r in icon_rows()]
    write_table(icons, CREDIT, folder / "icons.parquet")
    out, tokenizer = str(folder / "shards"), str(word_tokenizer(folder))
    return render.Plan(str(folder / "icons.parquet"), out, "train", 150, 32, 7, 50, tokenizer)


@pytest.fixture(scope="module")
def train(plan: render.Plan) -> list[tuple[str, dict[str, object]]]:
    for number in range(3):
        render.write_shard(plan, number)
    reader = ShardReader(Path(plan.out) / "train", shuffle=False, epochs=1, size=(32, 32))
    samples = list(reader)
    assert reader.skipped == {}
    return [(sample.caption, sample.meta) for sample in samples]


def test_a_transform_that_draws() -> None:
    pixels = rasterise(icon_rows()[0]["svg"], 32)
    assert pixels.shape == (32, 32, 4)
    assert 0.2 < (pixels[..., 3] > 128).mean() < 0.8


def test_the_named_colour_is_drawn() -> None:
    for seed in range(40):
        drawn = draw_mono(row("heart", "mdi", "solid", False, "currentColor"), 48, random.Random(seed))
        target = np.array(colours.COLOURS[drawn.facts["foreground"]])
        assert np.abs(drawn.picture[20, 24].astype(int) - target).max() < 40
        corner = np.array(colours.COLOURS[drawn.facts["background"]])
        assert np.abs(drawn.picture[0, 0].astype(int) - corner).max() < 40
        if drawn.facts["background"] == "white":
            assert (drawn.picture[0, 0] == 255).all()


def test_most_emoji_are_on_white_and_touch_no_edge() -> None:
    emoji = row("apple", "noto", "noto emoji", True, "#c33")
    drawn = [draw_colour(emoji, 64, "emoji", random.Random(i)) for i in range(300)]
    grounds = Counter(one.facts["background"] for one in drawn)
    assert 0.88 < grounds["white"] / 300 < 0.99
    assert grounds["red"] == 0
    for one in drawn:
        edge = np.concatenate([one.picture[0], one.picture[-1], one.picture[:, 0], one.picture[:, -1]])
        assert (edge == edge[0]).all()


def test_a_colour_word_turns_the_main_hue_and_nothing_else() -> None:
    apple = rasterise(row("apple", "noto", "noto emoji", True, "#c33")["svg"], 32)
    blue = recoloured(apple, "blue")
    assert blue is not None
    inside = apple[..., 3] == 255
    assert (blue[inside][:, 2] > blue[inside][:, 0] + 60).all()
    assert (blue[..., 3] == apple[..., 3]).all()
    assert recoloured(apple, "red") is None  # it is red
    grey = rasterise(row("apple", "noto", "noto emoji", True, "#888")["svg"], 32)
    assert recoloured(grey, "blue") is None


def test_a_tint_is_named_in_place_of_the_emojis_own_colour() -> None:
    emoji = {**row("apple", "noto", "noto emoji", True, "#c33"), "phrase": "red apple"}
    tinted = [one for i in range(400) if (one := draw_colour(emoji, 16, "emoji", random.Random(i))).facts["foreground"]]
    assert len(tinted) > 20
    for one in tinted:
        assert f"{one.facts['foreground']} apple" in one.caption
        assert "red apple" not in one.caption
        assert not colours.held_pair("apple", one.facts["foreground"])


def test_only_the_default_look_goes_without_a_style() -> None:
    rows = mark_default_look(
        [row("apple", name, f"{name} emoji", True, "#c33") for name in ("noto", "fluent-emoji-3d")]
    )
    assert [one["default_look"] for one in rows] == [False, True]
    plain = {one["set"]: 0 for one in rows}
    for one in rows:
        for i in range(200):
            plain[one["set"]] += "emoji" not in draw_colour(one, 16, "emoji", random.Random(i)).caption
    assert plain["noto"] == 0
    assert 90 < plain["fluent-emoji-3d"] < 150


def test_a_composition_says_what_it_shows() -> None:
    first = row("apple", "mdi", "solid", False, "currentColor")
    second = row("bus", "mdi", "solid", False, "currentColor")
    layouts = set()
    for seed in range(100):
        drawn = draw_composition(first, second, 64, random.Random(seed))
        layout = drawn.facts["layout"]
        layouts.add(layout)
        assert "apple" in drawn.caption
        assert ("bus" in drawn.caption) == (layout not in ("count", "inside"))
        assert len(drawn.facts["rows"]) == (1 if layout in ("count", "inside") else 2)
    assert layouts == {"left", "right", "above", "below", "big", "count", "inside"}


def test_left_is_left() -> None:
    first = row("apple", "noto", "noto emoji", True, "#ff0000")
    second = row("bus", "twemoji", "twemoji", True, "#0000ff")
    for seed in range(80):
        drawn = draw_composition(first, second, 64, random.Random(seed))
        if drawn.facts["layout"] != "left":
            continue
        red = (drawn.picture[..., 0] > 200) & (drawn.picture[..., 1:] < 60).all(-1)
        blue = (drawn.picture[..., 2] > 200) & (drawn.picture[..., :2] < 60).all(-1)
        assert np.argwhere(red)[:, 1].mean() < np.argwhere(blue)[:, 1].mean()


def test_plain_shapes() -> None:
    shapes = shape_rows()
    assert {"circle", "square", "triangle", "star", "heart"} <= {shape["phrase"] for shape in shapes}
    for shape in shapes:
        coverage = (rasterise(shape["svg"], 32)[..., 3] > 128).mean()
        assert 0.05 < coverage < 0.95
    assert geometry(next(s for s in shapes if s["phrase"] == "star")) == "star"
    blue = {**row("heart", "noto", "noto emoji", True, "#00f"), "phrase": "blue heart"}
    assert geometry(blue) == "heart"
    assert geometry({**blue, "phrase": "broken heart"}) is None


def test_the_mix_has_every_kind(train: list[tuple[str, dict[str, object]]]) -> None:
    kinds = Counter(meta["kind"] for _, meta in train)
    assert set(kinds) == set(SHARES)
    assert 0.35 < kinds["emoji"] / len(train) < 0.7


def test_samples_do_not_depend_on_the_process(plan: render.Plan, train: list[tuple[str, dict[str, object]]]) -> None:
    render._source.cache_clear()
    for index in (149, 3, 77):
        drawn, rows = render.draw_sample(plan, index)
        meta = render.meta_of(drawn, rows, "train", render.sample_seed(plan, index))
        assert (drawn.caption, meta) == train[index]
    other, _ = render.draw_sample(dataclasses.replace(plan, seed=8), 3)
    assert other.caption != train[3][0] or other.kind != train[3][1]["kind"]


def test_nothing_held_out_is_trained_on(train: list[tuple[str, dict[str, object]]]) -> None:
    held = {r["id"] for r in icon_rows() if r["split"] != "train"}
    assert len(held) == 8
    for caption, meta in train:
        assert meta["split"] == "train"
        assert not held & set(str(meta["id"]).split(" + "))
        assert "banana" not in caption
        if meta["kind"] == "mono":
            assert not colours.held_pair(str(meta["concept"]), str(meta["foreground"]))
            assert not colours.held_colours(str(meta["foreground"]), str(meta["background"]))
        concepts = str(meta["concept"]).split(" + ")
        assert len(concepts) == 1 or not colours.held_concepts(*concepts)


def test_held_splits_hold_their_rows(plan: render.Plan) -> None:
    rows = render.read_rows(plan.parquet)
    held = {split: [r["id"] for r in render.held_rows(rows, split)] for split in render.HELD_SPLITS}
    # Emoji are drawn twice.
    assert held["style"] == ["twemoji:cat"] * 2
    assert held["val"] == ["tabler:bus"]
    assert len(held["concept"]) == 8  # no interface icon: the mix leaves those out
    drawn, (shown,) = render.draw_sample(dataclasses.replace(plan, split="style", samples=2), 1)
    assert shown["id"] == "twemoji:cat"
    assert "cat" in drawn.caption


def test_long_captions_are_thought_of_again_or_cut(plan: render.Plan) -> None:
    long = dataclasses.replace(plan, split="long")
    rows = [{**icon_rows()[0], "phrase": " ".join(["word"] * 60)}]
    render._source.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "_source", lambda parquet, split: rows)
        drawn, _ = render.draw_sample(long, 0)
    assert len(drawn.caption.split()) <= render.MAX_WORDPIECES


def test_the_sample_set_is_made_of_permissive_training_rows(plan: render.Plan, tmp_path: Path) -> None:
    rows = render.read_rows(plan.parquet)
    for r in rows:
        if r["set"] == "mdi":
            r["licence"] = "CC-BY-4.0"
    path = write_sample_set(rows, credits_of(plan.parquet), tmp_path, 20, seed=1)
    for sample in ShardReader(path, epochs=1):
        assert sample.meta["licence"] in ("MIT", "Apache-2.0", "MIT + MIT")
        assert "mdi" not in sample.meta["set"]
        assert sample.meta["author"].startswith("the ")
    text = write_notice(path, credits_of(plan.parquet)).read_text(encoding="utf-8")
    assert "| noto | Noto | the noto people | MIT |" in text
    assert "mdi" not in text


def test_the_shipped_sample_set_holds_nothing_held_out() -> None:
    words = {concept for concept in held_concepts() if " " not in concept}
    for sample in ShardReader(sample_shards(), epochs=1):
        assert sample.meta["split"] == "train"
        assert not words & set(sample.caption.replace(",", " ").replace(":", " ").split()), sample.caption
        if sample.meta["kind"] == "mono":
            assert not colours.held_pair(sample.meta["concept"], sample.meta["foreground"])


def test_only_training_rows_enter_the_mix() -> None:
    mix = Mix(icon_rows())
    for group in mix.groups.values():
        assert all(r["split"] == "train" for r in group.rows)
