"""`docs/follow.py` runs the commands of a page in order; those of `docs/distil-your-own.md` are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from docs import follow
from onestill.cli.app import make_app
from onestill.train.recipe import read_recipe

PAGE = Path(__file__).parents[1] / "docs/distil-your-own.md"


def test_blocks_without_a_language_are_commands_in_order() -> None:
    page = "# One\n\n```\necho a\n# b\n```\n\n    echo read only\n\n## Two\n\n```toml\n# x\n```\n\n```\necho c\n```\n"
    assert follow.blocks(page) == [("One", "echo a\n# b\n"), ("Two", "echo c\n")]


def test_one_shell_runs_them_until_the_first_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    commands = [
        ("a", "x=\"${PYTHONPATH-none}\"\ncat > file <<'END'\n$x\nEND\n"),
        ("b", 'test "$x" = none && test "$(cat file)" = \'$x\'\n'),
        ("c", "false | true\n"),
        ("d", "touch too-far\n"),
    ]
    seconds, status = follow.follow(commands, tmp_path)
    assert len(seconds) == 2
    assert status == 1
    assert not (tmp_path / "too-far").exists()
    assert follow.follow(commands[:2], tmp_path)[1] == 0


def test_a_line_that_a_command_left_unended_hides_no_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds, status = follow.follow([("a", "printf half\n"), ("b", "echo whole\n")], tmp_path)
    assert (len(seconds), status) == (2, 0)
    assert capsys.readouterr().out == "halfwhole\n"


def test_the_command_accepts_every_onestill_line_of_the_page() -> None:
    commands = "".join(block for _, block in follow.blocks(PAGE.read_text(encoding="utf-8")))
    commands = commands.replace("\\\n", "")
    lines = [shlex.split(line.rstrip("& "))[1:] for line in commands.splitlines() if line.startswith("onestill ")]
    for line in lines:
        command, name = typer.main.get_command(make_app()), "onestill"
        while hasattr(command, "commands"):
            name, *line = line
            command = command.commands[name]
        command.make_context(name, list(line))  # raises for an option that is not there
    asked = [line[0] for line in lines]
    trains = ["train", "train", "train", "generate", "export", "serve", "train", "evaluate"]
    assert asked == ["data", "data", "data", "data", *trains]


def test_the_recipes_of_the_page_are_valid(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    recipes = []
    for name, toml in re.findall(r"cat > (\w+)\.toml <<'END'\n(.*?)^END$", text, re.MULTILINE | re.DOTALL):
        (tmp_path / f"{name}.toml").write_text(toml, encoding="utf-8")
        recipes.append(read_recipe(tmp_path / f"{name}.toml"))
        assert (recipes[-1].data.shards, recipes[-1].out) == (["data/cached"], f"runs/{name}")
    assert [recipe.method for recipe in recipes] == ["add", "contrastive"]
    assert recipes[0].options.teacher == "models/teacher"
