"""Pictures of every kind that cameras, scanners and tools write, and files that hold what they were drawn from."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onestill.cli.commands.generate import read_image
from onestill.errors import ImageError
from onestill.pipeline import save_picture
from onestill.pipeline.picture import fitted, read_picture, upright

HALVES = np.vstack([np.zeros((8, 32, 3), np.uint8), np.full((8, 32, 3), 255, np.uint8)])  # black above white
# The sides at which the black half is for each orientation of EXIF: (axis, whether at its start).
BLACK_AT = {1: (0, True), 2: (0, True), 3: (0, False), 4: (0, False),
            5: (1, True), 6: (1, False), 7: (1, False), 8: (1, True)}  # fmt: skip


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def raw_exif(*fields: bytes, rest: bytes = b"") -> bytes:
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(fields)) + b"".join(fields) + bytes(4) + rest


def orientation(value: int) -> bytes:
    return struct.pack(">HHIHH", 0x0112, 3, 1, value, 0)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_turned_once(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = read_picture(encoded(Image.fromarray(HALVES), kind, exif=exif))
    axis, at_start = BLACK_AT[turn]
    assert picture.size == ((32, 16) if axis == 0 else (16, 32))
    grey = np.asarray(picture.convert("L")).mean(1 - axis)
    assert (grey[2] < 50, grey[-3] < 50) == (at_start, not at_start)
    np.testing.assert_array_equal(np.asarray(upright(picture)), np.asarray(picture))  # nor a second time


@pytest.mark.parametrize(
    "exif",
    [
        raw_exif(orientation(6), struct.pack(">HHII", 0x011A, 10, 1, 38), rest=struct.pack(">ii", -1, 0)),
        raw_exif(orientation(6), struct.pack(">HHII", 0x011A, 5, 1, 38), rest=struct.pack(">II", 2**32 - 1, 0)),
        raw_exif(orientation(6), struct.pack(">HHII", 0x9286, 7, 60000, 38), rest=bytes(60000)),
    ],
)
def test_what_exif_says_besides_is_nobodys_trouble(exif: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(HALVES), "JPEG", exif=exif))
    assert read_image(tmp_path / "a.jpg").size == (16, 32)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert fitted(picture, 32, 16).shape == (32, 16, 3)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage", b"Exif\0\0", raw_exif(orientation(6))[:16], raw_exif(orientation(99)),
        raw_exif(struct.pack(">HHI4s", 0x0112, 2, 4, b"6ab\0")),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's
def test_exif_that_is_none_turns_nothing(exif: bytes) -> None:
    assert read_picture(encoded(Image.fromarray(HALVES), "JPEG", exif=exif)).size == (32, 16)


RAMP = np.linspace(0, 255, 256).round().astype(np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "numbers",
    [
        RAMP, RAMP.astype(np.int32), RAMP.astype(np.int32) * 257, RAMP.astype(np.uint16) * 257,
        RAMP.astype(np.float32), RAMP.astype(np.float32) / 255,
    ],
)  # fmt: skip
def test_grey_of_any_depth_keeps_its_grey(numbers: np.ndarray[Any, Any]) -> None:
    read = np.asarray(read_picture(encoded(Image.fromarray(numbers), "TIFF")))
    np.testing.assert_array_equal(read, np.repeat(RAMP[..., None], 3, 2))


@pytest.mark.parametrize(
    "numbers",
    [
        RAMP.astype(np.int32) * 300, RAMP.astype(np.int32) - 5, RAMP.astype(np.float32) / 100,
        np.full((4, 4), np.nan, np.float32), np.array([[0, np.inf]], np.float32),
    ],
)  # fmt: skip
def test_numbers_without_a_white_are_refused(numbers: np.ndarray[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(encoded(Image.fromarray(numbers), "TIFF"))
    with pytest.raises(ImageError, match="its numbers go from"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".png"])
@pytest.mark.parametrize("letters", ["x" * 70_000, "漢" * 10_000, "a\ud800b\0c"])
def test_no_text_costs_the_drawn_picture(suffix: str, letters: str, tmp_path: Path) -> None:
    metadata = {"prompt": letters, "negative_prompt": letters, "seed": "17"}
    path = save_picture(Image.fromarray(HALVES), tmp_path / f"a{suffix}", metadata)
    with Image.open(path) as picture:
        picture.load()
        text = picture.info.get("parameters") or picture.getexif()[0x010E]
    text = text.decode() if isinstance(text, bytes) else text
    assert "Seed: 17" in text  # what draws the picture again is not what is cut
    if len(letters) < 9 or suffix != ".jpg":
        assert len(text) > 2 * len(letters)
