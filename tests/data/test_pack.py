from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from onestill.data.pack import Packed, pack
from onestill.errors import DataError


def picture(path: Path, width: int = 64, height: int = 64, mode: str = "RGB", caption: str = "a square") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), "red" if mode == "RGB" else (0, 0, 0, 0)).save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption + "\n")


def packed(folder: Path, size: int = 32) -> tuple[dict[str, Packed], dict[str, str]]:
    skipped: dict[str, str] = {}
    return {sample.key: sample for sample in pack(folder, size, skipped)}, skipped


def test_pictures_become_squares_that_say_where_they_were(tmp_path: Path) -> None:
    wide = Image.new("RGB", (160, 80), "white")
    wide.paste("blue", (40, 0, 120, 80))
    wide.save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a blue square")
    picture(tmp_path / "deep/er/tall.v2.jpg", 40, 60)
    samples, skipped = packed(tmp_path)
    assert skipped == {}
    assert samples.keys() == {"wide", "deep-er-tall-v2"}
    image = Image.open(io.BytesIO(samples["wide"].image))
    assert image.size == (32, 32)
    assert image.getpixel((1, 1))[2] > 200  # the middle, all blue
    assert image.getpixel((1, 1))[0] < 60
    assert samples["wide"].caption == "a blue square"
    assert samples["wide"].meta == {"file": "wide.png", "original_size": [80, 160], "crop": [0, 16]}
    assert samples["deep-er-tall-v2"].meta["crop"] == [8, 0]


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    picture(tmp_path / "clear.png", mode="RGBA")
    samples, _ = packed(tmp_path)
    assert min(Image.open(io.BytesIO(samples["clear"].image)).getpixel((5, 5))) > 250


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    picture(tmp_path / "mute.png", caption="")
    picture(tmp_path / "blank.png", caption=" ")
    picture(tmp_path / "tiny.png", 15, 400)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "broken.txt").write_text("nothing")
    samples, skipped = packed(tmp_path)
    assert list(samples) == ["good"]
    assert skipped.keys() == {"mute.png", "blank.png", "tiny.png", "broken.jpg"}
    assert "write one into mute.txt" in skipped["mute.png"]
    assert "15 x 400" in skipped["tiny.png"]


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_captions_from_a_table(tmp_path: Path, table: str) -> None:
    picture(tmp_path / "a/one.png", caption="")
    row = {"file_name": "a/one.png", "text": "one, in red"}
    csv = 'file_name,text\na/one.png,"one, in red"\n'
    (tmp_path / table).write_text(json.dumps(row) + "\n" if table.endswith("l") else csv)
    samples, _ = packed(tmp_path)
    assert samples["a-one"].caption == "one, in red"


def test_folders_and_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        packed(tmp_path / "none")
    (tmp_path / "metadata.jsonl").write_text('{"file": "x.png"}\n')
    with pytest.raises(DataError, match="file_name and text"):
        packed(tmp_path)
