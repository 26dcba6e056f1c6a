"""One row of the icon table, and how the table is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.icons.sets import RECOLOURABLE

_DICTIONARY = ("set", "style", "licence", "group", "junk", "lex", "split")


@dataclass
class Icon:
    """An icon with the words for it.

    `source` is "emoji", "interface" or "clipart"; `svg` or else `img` (WebP) is its drawing.
    """

    id: str
    set: str
    style: str
    licence: str
    name: str
    phrase: str
    concept: str
    group: str
    palette: bool
    source: str
    keywords: list[str] = field(default_factory=list)
    hex: str = ""
    tone: int = 0
    junk: str = ""
    lex: str = ""
    colors: list[str] = field(default_factory=list)
    split: str = ""
    svg: str | None = None
    img: bytes | None = None

    @property
    def recolour(self) -> bool:
        """Whether its colours may be changed."""
        return not self.palette or self.set in RECOLOURABLE


_TYPES = {
    **{name: pa.string() for name in ("id", "set", "style", "licence", "name", "phrase")},
    "keywords": pa.list_(pa.string()),
    "group": pa.string(),
    "palette": pa.bool_(),
    "concept": pa.string(),
    "hex": pa.string(),
    "tone": pa.int8(),
    "junk": pa.string(),
    "lex": pa.string(),
    "colors": pa.list_(pa.string()),
    "recolour": pa.bool_(),
    "split": pa.string(),
    "svg": pa.string(),
    "img": pa.binary(),
}


def to_table(icons: Sequence[Icon]) -> pa.Table:
    """The icons as an Arrow table in the given order."""
    columns = {}
    for name, kind in _TYPES.items():
        column = pa.array([getattr(icon, name) for icon in icons], kind)
        columns[name] = column.dictionary_encode() if name in _DICTIONARY else column
    return pa.table(columns)


def write_table(icons: Sequence[Icon], attribution: Mapping[str, Mapping[str, str]], path: Path) -> None:
    """Write the table, colour rows first, each set together.

    Who made what stands in the schema's metadata under `attribution`.
    """
    order = {name: i for i, name in enumerate(dict.fromkeys(icon.set for icon in icons))}
    rows = sorted(icons, key=lambda icon: (not icon.palette, order[icon.set], icon.id))
    credits = {name: dict(attribution[name]) for name in order}
    table = to_table(rows).replace_schema_metadata({"attribution": json.dumps(credits, ensure_ascii=False)})
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(
        table,
        partial,
        compression="zstd",
        compression_level=21,
        row_group_size=1 << 20,
        data_page_size=64 << 20,
        use_dictionary=[*_DICTIONARY, "concept"],
        write_statistics=False,
    )
    os.replace(partial, path)
