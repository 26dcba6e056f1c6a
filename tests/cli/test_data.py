from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from onestill.cli import main
from onestill.data import ShardWriter

Refused = Callable[..., str]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five pictures in two shards, and a sixth that is damaged."""
    with ShardWriter(tmp_path / "shards", 3) as writer:
        for i, colour in enumerate(["red", "green", "blue", "white", "black"]):
            file = io.BytesIO()
            Image.new("RGB", (16, 24), colour).save(file, "PNG")
            facts = {"set": "ours" if i < 4 else "theirs", "licence": "MIT"}
            writer.write(f"icon-{i}", file.getvalue(), f"a {colour} square", facts, suffix="png")
        writer.write("broken", b"no picture", "nothing", {}, suffix="png")
    return tmp_path / "shards"


def test_count(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "count", str(shards), "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["samples"] == 5
    assert counted["shards"] == 2
    assert counted["sizes"] == {"16x24": 5}
    assert counted["sets"] == {"ours": 4, "theirs": 1}
    assert counted["licences"] == {"MIT": 5}
    assert list(counted["skipped"]) == ["shard-000001.tar:broken"]


def test_count_in_words_names_what_was_skipped(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "count", str(shards)]) == 0
    said = capsys.readouterr()
    assert "5 samples in 2 shards" in said.out
    assert said.err.startswith("note: skipped shard-000001.tar:broken: ")


def test_sheet(shards: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "sheet", str(shards), "--out", "sheet.png", "--number", "4"]) == 0
    assert capsys.readouterr().out == "sheet.png\n"
    first = Path("sheet.png").read_bytes()
    with Image.open("sheet.png") as page:
        assert page.width > 4 * 16
    assert main(["data", "sheet", str(shards), "--out", "sheet.png", "--number", "4", "--force"]) == 0
    assert Path("sheet.png").read_bytes() == first
    assert [path.name for path in here.iterdir()] == ["sheet.png"]


def test_the_sample_set_is_what_is_read_unless_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "count", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["samples"] > 100
    assert counted["skipped"] == {}
    assert set(counted["licences"]) <= {"MIT", "Apache-2.0"}
    assert main(["data", "sheet", "--out", "sheet.webp", "--number", "8"]) == 0


def test_mistakes_are_one_line(refused: Refused, shards: Path, here: Path) -> None:
    assert "no shard" in refused("data", "count", "nowhere").casefold()
    assert "no shards" in refused("data", "count", here).casefold()
    assert ".png, .jpg or .webp" in refused("data", "sheet", shards, "--out", "sheet")
    (here / "sheet.png").touch()
    assert "--force" in refused("data", "sheet", shards, "--out", "sheet.png")
    assert "--number" in refused("data", "sheet", shards, "--out", "new.png", "--number", 0)
