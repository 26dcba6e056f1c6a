from __future__ import annotations

from pathlib import Path

import pytest

from onestill.cli.options import parse_loras, parse_size
from onestill.errors import OnestillError, SizeError


@pytest.mark.parametrize(
    ("text", "height_width"),
    [("256x128", (128, 256)), ("256X128", (128, 256)), (" 64 x 32 ", (32, 64)), ("96", (96, 96)), (None, (None, None))],
)
def test_size_is_width_by_height(text: str | None, height_width: tuple[int | None, int | None]) -> None:
    assert parse_size(text) == height_width


@pytest.mark.parametrize("text", ["", "x", "12x", "x12", "-1x5", "1.5x2", "1e3x5", "2x3x4", "9999999x1"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SizeError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_loras_are_files_with_or_without_a_scale(tmp_path: Path) -> None:
    colon = tmp_path / "a:1"
    colon.write_text("")
    assert parse_loras(["x.safetensors", "y.safetensors:0.7", str(colon)]) == {
        Path("x.safetensors"): 1.0,
        Path("y.safetensors"): 0.7,
        colon: 1.0,
    }
    assert parse_loras([f"{colon}:-1"]) == {colon: -1.0}
    assert parse_loras(["x.safetensors:0.5", "x.safetensors"]) == {Path("x.safetensors"): 1.5}
    with pytest.raises(OnestillError, match="write it as FILE or FILE:SCALE"):
        parse_loras(["x.safetensors:much"])
    assert parse_loras(None) == {}
