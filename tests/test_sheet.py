from __future__ import annotations

import numpy as np
import pytest

from onestill.pipeline.sheet import sheet


def test_pictures_stand_in_rows_over_their_captions() -> None:
    pictures = np.zeros((5, 32, 48, 3), np.uint8)
    pictures[3] = (255, 0, 0)
    page = sheet(pictures, ["a long caption that has to be wrapped"] * 5, columns=3)
    assert page.size == (3 * 60, 2 * (32 + 12 + 4 * 14))
    assert page.getpixel((6, page.height // 2 + 6)) == (255, 0, 0)
    plain = sheet(list(pictures), columns=9)
    assert plain.size == (5 * 60, 44)
    assert plain.getpixel((6, 6)) == (0, 0, 0)


def test_pictures_of_several_sizes() -> None:
    page = sheet([np.zeros((8, 8, 3), np.uint8), np.zeros((16, 4, 3), np.uint8)], ["a", ""], columns=2)
    assert page.width == 2 * 20


def test_what_is_no_sheet() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        sheet([])
    with pytest.raises(ValueError, match="1 pictures but 2 captions"):
        sheet(np.zeros((1, 4, 4, 3), np.uint8), ["a", "b"])
