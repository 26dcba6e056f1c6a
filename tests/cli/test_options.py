from __future__ import annotations

import pytest

from onestill.cli.options import parse_size
from onestill.errors import SizeError


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
