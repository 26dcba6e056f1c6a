"""A folder of captioned pictures -> samples of one square size, for shards."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from onestill.data.picture import DAMAGE
from onestill.data.tarindex import KEY_BYTES, plain_key
from onestill.errors import DataError
from onestill.pipeline.picture import read_picture

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TABLES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Packed:
    """One picture as a shard takes it: WebP bytes, caption, and where its square was cut from, in pixels.

    Long names may share a `key`, which is cut to leave room for a number; `meta["file"]` has the whole name.
    """

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any]


def pack(folder: Path, size_px: int, skipped: dict[str, str]) -> Iterator[Packed]:
    """The pictures of `folder` and its subfolders, by name, each cut to a centred square and scaled to `size_px`.

    A caption is the text file of the same name beside the picture, or its row in the folder's `metadata.jsonl` or
    `metadata.csv` (`file_name`, `text`). What has none, cannot be decoded, or is less than half of `size_px` on a side
    is left out, and `skipped` names it with the reason.

    Raises:
        DataError: the folder does not exist, or its table of captions cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}: give one that holds pictures.")
    captions = _table(folder)
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        name = os.fsencode(path.relative_to(folder).as_posix()).decode(errors="replace")
        try:
            caption = captions.get(name) or _beside(path)
            yield _packed(name, path, caption, size_px)
        except DAMAGE as error:
            skipped[name] = str(error) or type(error).__name__


def _packed(name: str, path: Path, caption: str, size_px: int) -> Packed:
    image = read_picture(path)
    width, height = image.size
    side = min(width, height)
    if 2 * side < size_px:
        raise ValueError(f"it is {width} x {height} pixels, too small for {size_px}")
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size_px, size_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    square.save(file, "WEBP", quality=95, method=4)
    # SDXL is conditioned on sizes as they are after scaling the short side, which is where a crop's place is measured.
    crop = [round(top * size_px / side), round(left * size_px / side)]
    key = plain_key(name.rsplit(".", 1)[0], KEY_BYTES - len("0000001-"))
    return Packed(key, file.getvalue(), caption, {"file": name, "original_size": [height, width], "crop": crop})


def _beside(path: Path) -> str:
    file = path.with_suffix(".txt")
    caption = file.read_text(encoding="utf-8-sig").strip() if file.is_file() else ""
    if not caption:
        raise ValueError(f"it has no caption: write one into {file.name}")
    return caption


def _table(folder: Path) -> dict[str, str]:
    """Captions by file name from the folder's table, if it has one."""
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if not found:
        return {}
    try:
        text = found[0].read_text(encoding="utf-8-sig")  # as Excel marks it
        if found[0].suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text)))
        return {row["file_name"]: str(row["text"] or "").strip() for row in rows}
    except UnicodeDecodeError as error:
        raise DataError(f"{found[0]} is not in UTF-8: save it again as UTF-8 (in Excel: CSV UTF-8).") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{found[0]} is no table of captions: each row needs file_name and text.") from error
