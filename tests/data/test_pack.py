from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestill.data import ShardReader, ShardWriter
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


def test_names_of_any_length_and_letters_fit_a_shard(tmp_path: Path) -> None:
    names = ["n" * 105, "ö" * 100, "deep/" * 20 + "down"]
    for name in names:
        picture(tmp_path / "in" / f"{name}.png")
    odd = os.fsdecode(b"caf\xe9.png")
    picture(tmp_path / "in" / odd)
    skipped: dict[str, str] = {}
    arrays = {"latents": np.zeros((4, 4, 4), np.float16)}
    with ShardWriter(tmp_path / "out") as writer:
        for count, sample in enumerate(pack(tmp_path / "in", 32, skipped), 1):
            writer.write(f"{count:07d}-{sample.key}", sample.image, sample.caption, sample.meta, arrays=arrays)
    assert skipped == {}
    samples = {sample.meta["file"]: sample for sample in ShardReader(tmp_path / "out", epochs=1)}
    assert samples.keys() == {f"{name}.png" for name in names} | {"caf\N{REPLACEMENT CHARACTER}.png"}
    assert samples["ö" * 100 + ".png"].key.endswith("-" + "ö" * 40)
    assert "n" * 80 in samples["n" * 105 + ".png"].key


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_mark_before_the_text_is_no_part_of_it(tmp_path: Path, encoding: str) -> None:
    picture(tmp_path / "one.png", caption="")
    picture(tmp_path / "two.png", caption="")
    (tmp_path / "metadata.csv").write_text("file_name,text\none.png,größer\n", encoding=encoding)
    (tmp_path / "two.txt").write_text("zwei", encoding=encoding)
    samples, _ = packed(tmp_path)
    assert [sample.caption for sample in samples.values()] == ["größer", "zwei"]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_table_in_another_encoding_is_told(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text\none.png,größer\n", encoding=encoding)
    with pytest.raises(DataError, match="CSV UTF-8"):
        packed(tmp_path)


@pytest.mark.parametrize("table", ['jsonl|{"file_name": "a.png", "text": null}', "csv|file_name,text\na.png\n"])
def test_a_row_without_a_caption_is_named(tmp_path: Path, table: str) -> None:
    picture(tmp_path / "a.png", caption="")
    suffix, text = table.split("|")
    (tmp_path / f"metadata.{suffix}").write_text(text)
    samples, skipped = packed(tmp_path)
    assert samples == {}
    assert "no caption" in skipped["a.png"]


def test_a_line_of_a_table_ends_where_the_line_ends(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", caption="")
    row = {"file_name": "a.png", "text": "one\N{LINE SEPARATOR}two"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    samples, _ = packed(tmp_path)
    assert samples["a"].caption == row["text"]


def test_folders_and_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        packed(tmp_path / "none")
    (tmp_path / "metadata.jsonl").write_text('{"file": "x.png"}\n')
    with pytest.raises(DataError, match="file_name and text"):
        packed(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,{'x' * 200_000}\n")
    with pytest.raises(DataError, match="file_name and text"):
        packed(tmp_path)
