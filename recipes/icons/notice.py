"""Write who made the icons and under which licence.

    python -m recipes.icons.notice --parquet icons.parquet [--out src/onestill/models/icons/NOTICE]

writes, by default, recipes/icons/NOTICE-data.md from the attribution that the table carries.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from recipes.icons.mix import kinds_of
from recipes.icons.render import read_rows
from recipes.icons.shapes import ATTRIBUTION, SET

MODEL_HEAD = """# The icons that the model `icons` is made from

The model `icons` was trained on drawings from the sets below. This list is written by `recipes/icons/notice.py`
from what the sets state about themselves. "Icons" counts the drawings that training saw. Drawings were scaled,
those of one colour were coloured, the main hue of some was turned, and drawings were put together in one picture.
Names may be trademarks of their makers, who do not endorse this project.
"""
SAMPLE_HEAD = """# The icons of the sample set

The pictures in `icons-000000.tar` were drawn from the sets below; the JSON beside each picture names its icon,
set, licence and author. "Icons" counts the drawings taken. They were scaled, those of one colour were coloured,
the main hue of some was turned, and drawings were put together in one picture. Names may be trademarks of their
makers, who do not endorse this project.
"""

_MIT = """
## The MIT licence

For the sets under MIT, each with the copyright of the author named above:

> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
> documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
> rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
> persons to whom the Software is furnished to do so, subject to the following conditions:
>
> The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
> Software.
>
> THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
> WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
> COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
> OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

The text of the Apache License 2.0 is in the project's `LICENSE`. CC-BY-4.0, CC0-1.0 and ISC are named by their SPDX
identifiers.

Captions were made with the names of emojibase-data (MIT, Miles Johnson) and emojilib (MIT, Mu-An Chiou) and with
WordNet 3.1
(Princeton University, WordNet licence).
"""


def credits_of(parquet: str | Path) -> dict[str, dict[str, str]]:
    """Set -> name, author, licence and, where it is known, url, from an icon table; the plain shapes are added."""
    stored = pq.read_schema(parquet).metadata[b"attribution"]
    found: dict[str, dict[str, str]] = json.loads(stored)
    return {**found, SET: ATTRIBUTION}


def notice(head: str, credit: Mapping[str, Mapping[str, str]], counts: Mapping[str, int]) -> str:
    """The notice as Markdown: `head`, the sets by number of icons, the terms."""
    lines = ["", "| set | name | author | licence | icons |", "|---|---|---|---|---|"]
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        facts = credit[name]
        licence = f"[{facts['licence']}]({facts['url']})" if facts.get("url") else facts["licence"]
        lines.append(f"| {name} | {facts['name']} | {facts['author']} | {licence} | {counts[name]} |")
    return head + "\n".join(lines) + "\n" + _MIT


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", required=True, help="the icon table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "NOTICE-data.md")
    options = parser.parse_args(arguments)
    rows = read_rows(options.parquet)
    trained = [row for row, kind in zip(rows, kinds_of(rows), strict=True) if kind and row["split"] == "train"]
    counts = Counter(row["set"] for row in trained)
    options.out.write_text(notice(MODEL_HEAD, credits_of(options.parquet), counts), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
