from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from onestill.errors import RecipeError
from onestill.train.recipe import METHODS, Recipe, parse_recipe, read_recipe


def table(**more: Any) -> dict[str, Any]:
    return {"name": "small", "method": "diffusion", "out": "runs/small", **more}


def test_defaults_and_given_values() -> None:
    recipe = parse_recipe(table(loop={"iterations": 7}, diffusion={"lr": 1, "unet": {"channels": 4}}))
    assert (recipe.loop.iterations, recipe.loop.batch_size) == (7, 32)
    assert recipe.options.lr == 1.0
    assert isinstance(recipe.options.lr, float)
    assert recipe.options.unet.channels == 4
    assert recipe.options.unet.block_out_channels == [128, 256]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_options_with_defaults(method: str) -> None:
    recipe = parse_recipe(table(method=method))
    assert recipe.resolved()[method]
    assert json.loads(json.dumps(recipe.resolved())) == recipe.resolved()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"method": "difusion"}, "Did you mean 'diffusion'"),
        ({"method": None}, "choose one of autoencoder"),
        ({"lop": {}}, "Did you mean 'loop'"),
        ({"add": {}}, "unknown key 'add'"),
        ({"loop": {"iteration": 3}}, "unknown key 'loop.iteration'. Did you mean 'iterations'"),
        ({"diffusion": {"unet": {"chanels": 4}}}, "'diffusion.unet.chanels'. Did you mean 'channels'"),
        ({"loop": 3}, "'loop' must be a table"),
        ({"name": ""}, "needs a text 'name'"),
        ({"out": 3}, "needs a text 'out'"),
        ({"loop": {"iterations": "3"}}, "loop.iterations must be int, not '3'"),
        ({"loop": {"iterations": 3.0}}, "loop.iterations must be int"),
        ({"loop": {"iterations": True}}, "loop.iterations must be int, not True"),
        ({"loop": {"compile": 1}}, "loop.compile must be bool, not 1"),
        ({"method": "contrastive", "loop": {"compile": True}}, "loop.compile is for .*, not for contrastive"),
        ({"loop": {"iterations": 0}}, "loop.iterations must be at least 1, not 0"),
        ({"loop": {"batch_size": 0}}, "loop.batch_size must be from 1 to 65536, not 0"),
        ({"loop": {"precision": "bf-16"}}, "must be one of no, bf16, not 'bf-16'. Did you mean 'bf16'"),
        ({"loop": {"ema_decay": float("nan")}}, "loop.ema_decay must be from 0.0"),
        ({"diffusion": {"lr": -1e-3}}, "diffusion.lr must be from 0.0 to 1.0"),
        ({"diffusion": {"unet": {"attention": True}}}, "diffusion.unet.attention must be a list"),
        ({"diffusion": {"unet": {"attention": [1]}}}, r"diffusion.unet.attention\[0\] must be bool"),
        ({"data": {"shards": "a.tar"}}, "data.shards must be a list"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        parse_recipe({**table(), **wrong})


@pytest.mark.parametrize("method", ["add", "ladd"])
@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("head_width", 64, "heads.width"),
        ("discriminator_lr", 1e-3, "heads.lr"),
        ("cnn", "folder", "features.cnn"),
        ("adversarial", 0.05, "adversarial.weight"),
        ("lambda_distill", 1.0, "distillation.lambda_distill"),
        ("feature_high", 249, "discriminator_input.t_high"),
        ("timestep_weights", [1.0], "student_input.weights"),
    ],
)
def test_an_old_key_names_the_new_one(method: str, old: str, value: Any, new: str) -> None:
    sentence = f"the key '{method}.{old}' belongs in a table: write '{method}.{new}'."
    with pytest.raises(RecipeError, match=f"^{re.escape(sentence)}$"):
        parse_recipe({"name": "old", "method": method, "out": "runs/old", method: {old: value}})


def test_read_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('name = "small"\nmethod = "add"\nout = "runs/small"\n[add]\nlr = 1e-4\n', encoding="utf-8")
    sets = [
        "loop.iterations=9",
        "add.lr=2e-4",
        "out=elsewhere",
        'data.shards=["a", "b"]',
        "add.features.tower_layers=[1]",
    ]
    recipe = read_recipe(path, sets)
    assert (recipe.loop.iterations, recipe.options.lr, recipe.out) == (9, 2e-4, "elsewhere")
    assert (recipe.data.shards, recipe.options.features.tower_layers) == (["a", "b"], [1])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("loop.iterations", "--set takes KEY=VALUE"),
        ("=3", "--set takes KEY=VALUE"),
        ("loop..iterations=3", "--set takes KEY=VALUE"),
        ("name.first=3", "'name' is not a table"),
        ("loop.iteratons=3", "Did you mean 'iterations'"),
        ("loop.iterations=many", "loop.iterations must be int, not 'many'"),
    ],
)
def test_wrong_overrides(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "small.toml"
    path.write_text('name = "small"\nmethod = "add"\nout = "runs/small"\n', encoding="utf-8")
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(path, [text])


@pytest.mark.parametrize("content", [b"name = ", b"name = '\xff'"])
def test_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "small.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="is not valid TOML"):
        read_recipe(path)


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


def fingerprint(**more: Any) -> str:
    return parse_recipe(table(**more)).fingerprint()


def test_fingerprint_leaves_out_length_place_and_bookkeeping() -> None:
    same = fingerprint()
    assert fingerprint(out="elsewhere") == same
    assert fingerprint(data={"prefetch": 0}) == same
    for change in ({"iterations": 3}, {"threads": 2}, {"log_every": 1}, {"checkpoint_every": 3}, {"device": "cuda"}):
        assert fingerprint(loop=change) == same
    assert fingerprint(diffusion={"sheet_prompts": ["a fox"]}) == same


def test_fingerprint_keeps_what_changes_the_numbers() -> None:
    same = fingerprint()
    for change in ({"seed": 3}, {"batch_size": 4}, {"ema_decay": 0.5}, {"precision": "bf16"}, {"warmup": 3}):
        assert fingerprint(loop=change) != same
    assert fingerprint(data={"seed": 3}) != same
    assert fingerprint(diffusion={"snr_gamma": 3.0}) != same
    assert fingerprint(diffusion={"unet": {"channels": 4}}) != same


def test_defaults_are_not_shared() -> None:
    first: Recipe = parse_recipe(table())
    first.options.unet.block_out_channels.append(7)
    assert parse_recipe(table()).options.unet.block_out_channels == [128, 256]
