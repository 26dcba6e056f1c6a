"""The methods can be read in one sitting: short files, a step that fits one screen, and nothing written twice."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, is_dataclass
from itertools import combinations
from pathlib import Path
from typing import get_type_hints

import pytest

import onestill.train.methods
from onestill.train.methods.add import Options
from onestill.train.methods.distiller import DistilOptions

METHODS = {path.stem: path.read_text() for path in sorted(Path(onestill.train.methods.__path__[0]).glob("[!_]*.py"))}


def test_the_step_of_add_fits_one_screen_and_names_its_equations() -> None:
    tree = ast.parse(METHODS["add"])
    (step,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "step")
    lines = METHODS["add"].splitlines()[step.lineno - 1 : step.end_lineno]
    assert len(lines) < 60
    text = "\n".join(lines)
    assert all(f"Eq. {number}" in text for number in (1, 2, 3, 4))


@pytest.mark.parametrize(("name", "most"), [("add", 300), ("ladd", 200), ("lcm", 200)])
def test_a_methods_file_is_short(name: str, most: int) -> None:
    assert len(METHODS[name].splitlines()) < most


def test_the_page_on_add_has_every_option_in_its_tables() -> None:
    page = Path("docs/distil.md").read_text(encoding="utf-8")
    for table in ("add", *(f"add.{name}" for name, kind in get_type_hints(Options).items() if is_dataclass(kind))):
        kind = get_type_hints(Options)[table.split(".")[1]] if "." in table else DistilOptions
        section = page.split(f": `[{table}]`\n")[1].split("\n## ")[0]
        rows = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
        assert set(re.findall(r"`(\w+)`", rows)) == {field.name for field in fields(kind)}, table


def blocks(text: str) -> set[tuple[str, ...]]:
    """Every six lines in a row, without blank lines, comments and imports."""
    lines = [line.strip() for line in text.split("from __future__")[-1].splitlines()]
    code = [line for line in lines if line and not line.startswith(("#", "import ", "from "))]
    return {tuple(code[i : i + 6]) for i in range(len(code) - 5)}


@pytest.mark.parametrize(("one", "other"), list(combinations(METHODS, 2)))
def test_two_methods_share_no_block(one: str, other: str) -> None:
    assert blocks(METHODS[one]) & blocks(METHODS[other]) == set()
