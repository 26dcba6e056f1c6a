"""What the commands say, and where."""

from __future__ import annotations

import pytest
from rich.table import Table

from onestill.cli.console import announced, note_device, once, stdout_console
from onestill.engine.device import choose


def test_a_table_that_is_piped_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(*(f"column {i:02d}" for i in range(12)), box=None)
    table.add_row(*(f"value {i:02d}" for i in range(12)))
    stdout_console().print(table)
    heads, values = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heads == [word for i in range(12) for word in ("column", f"{i:02d}")]
    assert values == [word for i in range(12) for word in ("value", f"{i:02d}")]


def test_what_is_said_once_is_said_when_it_is_first_asked_for() -> None:
    said: list[str] = []
    say = once(lambda: said.append("one"))
    assert said == []
    say()
    say()
    assert said == ["one"]
    items = announced([1, 2], lambda: said.append("two"))
    assert said == ["one"]
    assert list(items) == [1, 2]
    assert said == ["one", "two"]


@pytest.mark.parametrize(
    ("asked", "engine", "lines"), [(None, "torch", 1), ("auto", "torch", 1), ("cpu", "torch", 0), (None, "openvino", 0)]
)
def test_a_device_is_named_where_it_was_chosen_for_the_user(
    asked: str | None, engine: str, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    note_device(asked, engine, choose(asked) if engine == "torch" else "cpu")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("note: torch computes on ") == said.err.count("\n") == lines
