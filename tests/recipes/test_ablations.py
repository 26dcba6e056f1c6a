from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from onestill.errors import RecipeError
from recipes.ablations import run
from recipes.ablations.block import read_block, row_recipe
from tests.evaluate.test_networks import contrastive
from tests.recipes.test_evaluate import data  # noqa: F401 - a fixture
from tests.train.parts import write_parts

BLOCKS = sorted(path for path in Path("recipes/ablations").glob("*.toml") if "[[row]]" in path.read_text())


@pytest.mark.parametrize("path", BLOCKS, ids=lambda path: path.stem)
def test_every_row_is_a_recipe(path: Path) -> None:
    block = read_block(path)
    assert len(block.row) >= 4
    assert all(row.paper for row in block.row)


def test_the_short_block_holds_the_loss_terms_apart_and_all_else_alike() -> None:
    path = Path("recipes/ablations/cpu.toml")
    block = read_block(path)
    recipes = {row.name: row_recipe(path, block, row) for row in block.row}
    assert len({recipe.options.teacher for recipe in recipes.values()}) == 1
    assert len({(r.loop.iterations, r.loop.batch_size, r.loop.seed, r.data.seed) for r in recipes.values()}) == 1
    terms = {
        name: (recipes[name].options.adversarial.weight, recipes[name].options.distillation.lambda_distill)
        for name in list(recipes)[:3]
    }
    (weight, lambda_distill), *_ = terms.values()
    assert weight > 0 < lambda_distill
    assert terms == {
        "ADD": (weight, lambda_distill),
        "adversarial only": (weight, 0.0),
        "distillation only": (0.0, lambda_distill),
    }
    assert [row.steps for row in block.row if row.name == "LCM"] == [[1, 2, 4]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("add.distillation.lambda_distill", "add.distillation.lambda"), "Did you mean 'lambda_distill'"),
        (("paper =", "papre ="), "Did you mean 'paper'"),
        (('name = "LCM"', 'name = "add"'), "differ by more than punctuation"),
        (('claim = "ADD"', 'claim = "GAN"'), "a row 'GAN' that it does not have"),
    ],
)
def test_blocks_with_mistakes_are_refused(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    text = Path("recipes/ablations/cpu.toml").read_text().replace("../icons", str(Path("recipes/icons").resolve()))
    shutil.copytree("recipes/ablations", tmp_path / "x")
    (tmp_path / "x/cpu.toml").write_text(text.replace(*change))
    with pytest.raises(RecipeError, match=sentence):
        read_block(tmp_path / "x/cpu.toml")


def test_no_row_is_begun_that_would_end_too_late() -> None:
    budget = run.Budget(10)
    assert budget.fits()
    budget.slowest_s = 10 * 60 * run.TRAINING_SHARE - 1
    assert budget.fits()
    budget.slowest_s += 2
    assert not budget.fits()
    endless = run.Budget(0)
    endless.slowest_s = 1e9
    assert endless.fits()


@pytest.mark.slow
def test_a_block_is_trained_and_measured(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    torch.set_num_threads(1)
    parts = write_parts(tmp_path / "parts")
    model, words, shards = parts / "model", tmp_path / "words", tmp_path / "cached"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(model / part, words, dirs_exist_ok=True)
    from onestill.cli import main

    assert main(["data", "cache", str(data / "val"), "--model", str(model), "--out", str(shards)]) == 0
    text = Path("recipes/ablations/cpu.toml").read_text().split("[[row]]")
    base = Path("recipes/ablations").resolve()
    block = tmp_path / "three.toml"
    rows = "[[row]]".join([text[0], *text[1:3], text[4]])
    rows = rows.replace("loop.iterations=150", "loop.iterations=2").replace("loop.batch_size=16", "loop.batch_size=4")
    rows = rows.replace("[1, 4, 25]", "[1, 2]").replace(
        'beats = ["adversarial only", "distillation only"]', 'beats = ["adversarial only"]'
    )
    block.write_text(rows.replace('"add.toml"', f'"{base}/add.toml"').replace('"lcm.toml"', f'"{base}/lcm.toml"'))
    arguments = [str(block), "--data", str(data), "--network", str(contrastive(tmp_path / "n")), "--captions", "12"]
    arguments += ["--teacher", str(model / "unet"), "--autoencoder", str(model / "vae"), "--text-encoder", str(words)]
    arguments += ["--shards", str(shards), "--set", "loop.threads=1", "--set", "loop.log_every=1"]
    arguments += ["--out", str(tmp_path / "out"), "--report", str(tmp_path / "report")]
    run.main(arguments)
    report = json.loads((tmp_path / "report/three/report.json").read_text())
    measured = [(one["group"], one["num_inference_steps"]) for one in report["results"]]
    assert measured == [
        ("ADD", 1), ("adversarial only", 1), ("LCM", 1), ("LCM", 2), ("LCM", 4), ("teacher", 1), ("teacher", 2),
    ]  # fmt: skip
    assert all(one["frechet_distance"]["value"] > 0 for one in report["results"])
    (target,) = report["targets"]
    assert "against" in target["note"]
    page, table = ((tmp_path / "report/three" / name).read_text() for name in ("index.html", "README.md"))
    assert "hinge at the end" in page
    assert str(tmp_path) not in page + table + json.dumps(report)
    assert "| adversarial only | 1 |" in table
    assert "ADD: 2 iterations in" in capsys.readouterr().out

    kept = tmp_path / "out/three/adversarial-only/model/onestill.json"
    before = kept.stat().st_mtime_ns
    run.main(arguments)  # everything is there
    assert kept.stat().st_mtime_ns == before
    assert "iterations in" not in capsys.readouterr().out

    with pytest.raises(SystemExit) as stopped:  # other weights in the teacher's place
        run.main([*arguments, "--teacher", str(tmp_path / "out/three/lcm/run/export/unet")])
    assert stopped.value.code == 2
    assert "begun with another teacher" in capsys.readouterr().err
