from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from onestill.errors import RecipeError
from onestill.train.recipe import read_recipe
from recipes.ablations import run
from tests.evaluate.test_networks import contrastive
from tests.recipes.test_evaluate import data  # noqa: F401 - a fixture
from tests.train.parts import write_parts

BLOCKS = sorted(path for path in Path("recipes/ablations").glob("*.toml") if "[[row]]" in path.read_text())


@pytest.mark.parametrize("path", BLOCKS, ids=lambda path: path.stem)
def test_every_row_is_a_recipe(path: Path) -> None:
    block = run.read_block(path)
    names = [run.slug(row["name"]) for row in block["row"]]
    assert len(set(names)) == len(names) >= 4
    assert all(row["paper"] for row in block["row"])


def test_rows_that_name_no_setting_are_refused(tmp_path: Path) -> None:
    block = 'title = "x"\npaper = "y"\nbase = "recipes/icons/cpu/4-student.toml"\n'
    (tmp_path / "x.toml").write_text(block + '[[row]]\nname = "a"\npaper = "b"\nset = ["add.lambda=1.0"]\n')
    with pytest.raises(RecipeError, match="lambda_distill"):
        run.read_block(tmp_path / "x.toml")


@pytest.mark.slow
def test_a_block_is_trained_and_measured(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    torch.set_num_threads(1)
    parts = write_parts(tmp_path / "parts")
    words = tmp_path / "words"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(parts / "model" / part, words, dirs_exist_ok=True)
    shards = tmp_path / "cached"
    from onestill.cli import main

    assert main(["data", "cache", str(data / "val"), "--model", str(parts / "model"), "--out", str(shards)]) == 0
    block = tmp_path / "two.toml"
    text = Path("recipes/ablations/losses.toml").read_text().split("[[row]]")
    block.write_text("[[row]]".join(text[:1] + text[3:4]) + "\n[[row]]" + text[1])
    base = read_recipe(Path("recipes/icons/cpu/4-student.toml"))
    assert base.options.feature_network == "teacher"
    model = parts / "model"
    sets = [f'data.shards=["{shards}"]', "loop.iterations=2", "loop.batch_size=4", "loop.threads=1", "add.head_width=8"]
    sets += [f'add.teacher="{model}/unet"', f'add.autoencoder="{model}/vae"', f'add.text_encoder="{words}"']
    arguments = [str(block), "--data", str(data), "--network", str(contrastive(tmp_path / "n")), "--captions", "12"]
    arguments += ["--out", str(tmp_path / "out"), *(part for one in sets for part in ("--set", one))]
    run.main(arguments)
    rows = json.loads((tmp_path / "out/two/results.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["both, exponential", "adversarial only"]
    assert all(row["fid"] > 0 for row in rows)
    assert "| adversarial only | 1 |" in (tmp_path / "out/two/results.md").read_text()
    kept = tmp_path / "out/two/adversarial-only/model/onestill.json"
    before = kept.stat().st_mtime_ns
    run.main(arguments)  # everything is there
    assert kept.stat().st_mtime_ns == before
