"""Contact sheets: many pictures with their captions on one, for looking at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 6
_TEXT_PX = 11
_LINE_PX = 14
_LINES = 4


def sheet(
    pictures: Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8],
    captions: Sequence[str] | None = None,
    columns: int = 8,
) -> Image.Image:
    """Pictures, each uint8 [H, W, 3], in rows of `columns`, each over its caption (at most four lines).

    All cells are as large as the largest picture. Raises ValueError without pictures or with too many or few captions.
    """
    if len(pictures) == 0 or columns < 1:
        raise ValueError("a sheet needs at least one picture and one column")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures but {len(captions)} captions")
    columns = min(columns, len(pictures))
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    font = ImageFont.load_default(_TEXT_PX)
    characters = max(8, int(width / (font.getlength("abcdefghij klmnopqrst") / 21)))
    cell = (width + 2 * _MARGIN, height + 2 * _MARGIN + (_LINES * _LINE_PX if captions is not None else 0))
    page = Image.new("RGB", (columns * cell[0], -(-len(pictures) // columns) * cell[1]), (232, 232, 234))
    draw = ImageDraw.Draw(page)
    for i, picture in enumerate(pictures):
        x, y = i % columns * cell[0] + _MARGIN, i // columns * cell[1] + _MARGIN
        page.paste(Image.fromarray(np.ascontiguousarray(picture)), (x, y))
        if captions is not None:
            lines = textwrap.wrap(captions[i], characters)[:_LINES]
            draw.multiline_text((x, y + height + 3), "\n".join(lines), fill=(20, 20, 22), font=font, spacing=2)
    return page
