"""Some damaged files of every kind, always the same: each is read, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import Target, attempt, targets

NAMES = ["pictures", "shards", "tables", "csv", "sums", "keys", "model", "loading", "sd15", "sd15-file", "sdxl",
         "sdxl-file", "loras", "recipes", "checkpoints", "towers"]  # fmt: skip


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    made = {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}
    assert list(made) == NAMES
    return made


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_read_or_refused_in_one_sentence(every: dict[str, Target], name: str) -> None:
    target = every[name]
    wrong = {number: said for number in range(target.count) if (said := attempt(target, 0, number)) is not None}
    assert wrong == {}


def test_what_a_reader_does_not_expect_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2 3")
    target = Target("numbers", (tmp_path / "a.txt",), lambda path: [int(word) for word in path.read_text().split()])
    assert any(attempt(target, 0, number) for number in range(30))
    assert (tmp_path / "a.txt").read_text() == "1 2 3"
