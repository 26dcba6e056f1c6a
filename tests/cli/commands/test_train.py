from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from onestill.cli import main
from tests.train import small

Refused = Callable[..., str]

RECIPE = f"""{small.RECIPE}
[loop]
iterations = 4
batch_size = 2
checkpoint_every = 2
log_every = 1
sheet_every = 4
"""


@pytest.fixture
def recipe(here: Path) -> Path:
    """A recipe of four iterations, and shards of noise for it."""
    small.write_noise_shards(here / "shards")
    path = here / "tiny.toml"
    path.write_text(RECIPE)
    return path


def losses() -> list[dict[str, float]]:
    """The rows of the run's diary, without what a clock decides."""
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("images_per_s", "data_wait")} for row in rows]


def test_a_dry_run_prints_the_recipe_and_makes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--dry-run", "--set", "loop.seed=3"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["loop"]["seed"] == 3
    assert resolved["parameters"]["autoencoder"] > 0
    assert not Path("run").exists()


def test_a_run_that_is_resumed_equals_one_that_was_not(recipe: Path) -> None:
    assert main(["train", str(recipe), "--set", "out=whole"]) == 0
    Path("whole").rename("run")
    whole = losses()
    Path("run").rename("whole")
    assert main(["train", str(recipe), "--set", "loop.iterations=2"]) == 0
    assert main(["train", str(recipe)]) == 2  # a run is there, and --resume was not said
    assert main(["train", str(recipe), "--resume"]) == 0
    assert losses() == whole


def test_mistakes_are_one_line(refused: Refused, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no recipe 'none.toml'" in refused("train", "none.toml")
    assert "iteration" in refused("train", recipe, "--set", "loop.iteration=2")
    assert "lr" in refused("train", recipe, "--set", "autoencoder.lr=high")
    recipe.write_text("name = ")
    assert str(recipe) in refused("train", recipe)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install 'onestill[train]'" in refused("train", recipe)
