from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from onestill.cli import main
from onestill.data import ShardReader, ShardWriter

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


def test_count_takes_nothing_for_markup(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 24)).save(file, "PNG")
    with ShardWriter(shards, prefix="odd") as writer:
        writer.write("odd", file.getvalue(), "odd", {"set": "[/]ours", "licence": "[red]MIT"}, suffix="png")
    assert main(["data", "count", str(shards)]) == 0
    said = capsys.readouterr().out
    assert "[/]ours 1" in said
    assert "[red]MIT 1" in said


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


def test_a_folder_of_pictures_is_packed_and_cached(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    for i, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (48, 32), colour).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a {colour} square")
    Image.new("RGB", (48, 32), "black").save(tmp_path / "mute.png")
    packed, cached = tmp_path / "packed", tmp_path / "cached"
    assert main(["data", "pack", str(tmp_path), "--out", str(packed), "--size", "32"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("3 samples")
    assert "left out mute.png" in captured.err
    assert "is not empty" in refused("data", "pack", tmp_path, "--out", packed)
    arguments = ["--model", str(tiny_folder), "--out", str(cached), "--batch-size", "2"]
    for part in ("0/2", "1/2"):
        assert main(["data", "cache", str(packed), *arguments, "--part", part]) == 0
    assert capsys.readouterr().err.count("note: torch computes on ") == 2
    samples = {sample.caption: sample for sample in ShardReader(cached, shuffle=False, epochs=1)}
    for before in ShardReader(packed, shuffle=False, epochs=1):
        assert (samples[before.caption].suffix, samples[before.caption].encoded) == (before.suffix, before.encoded)
    assert samples.keys() == {"a red square", "a green square", "a blue square"}
    red = samples["a red square"]
    assert red.arrays["latents"].shape == (4, 4, 4)
    assert red.arrays["text"].shape[0] == red.arrays["mask"].shape[0]
    assert red.meta["original_size"] == [32, 48]
    assert "with I below N" in refused("data", "cache", packed, *arguments, "--part", "2/2")
    assert "There is no device 'gpu'" in refused("data", "cache", packed, *arguments, "--device", "gpu")


def test_a_folder_without_one_good_picture(tmp_path: Path, refused: Refused) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "mute.png")
    assert "No picture" in refused("data", "pack", tmp_path, "--out", tmp_path / "packed")


def test_shards_are_fetched(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    url = f"file://{shards}/shard-{{000000..000001}}.tar"
    assert main(["data", "fetch", url, "--out", str(tmp_path / "here")]) == 0
    assert capsys.readouterr().out.startswith("2 shards")
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == ["shard-000000.tar", "shard-000001.tar"]
    assert all((tmp_path / "here" / name).read_bytes() == (shards / name).read_bytes() for name in names)
    assert "cannot be had" in refused("data", "fetch", f"file://{shards}/none.tar", "--out", tmp_path / "here")
