"""Rows of a small icon table: real SVG, a few concepts in several looks, every split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

_BODIES = {
    "apple": '<path fill="{c}" d="M12 5c6-3 9 2 8 7s-5 10-8 8c-3 2-7-3-8-8s2-10 8-7z"/>',
    "cat": '<path fill="{c}" d="M4 4l4 4h8l4-4v12l-8 6l-8-6z"/>',
    "heart": '<path fill="{c}" d="M12 21C4 15 2 11 3 7s7-4 9 0c2-4 8-4 9 0s-1 8-9 14z"/>',
    "bus": '<path fill="{c}" d="M3 5h18v12H3zM5 17h4v3H5zM15 17h4v3h-4z"/>',
}
_LOOKS = (
    ("noto", "noto emoji", True, "#c33"),
    ("twemoji", "twemoji", True, "#3a3"),
    ("fluent-emoji-flat", "fluent flat emoji", True, "#36c"),
    ("icon-park", "two-colour outline", True, "#2f88ff"),
    ("mdi", "solid", False, "currentColor"),
    ("tabler", "outline", False, "currentColor"),
)
BANANA = '<path fill="{c}" d="M4 6q8 14 16 10q-10 6-16-10z"/>'


def row(concept: str, icon_set: str, style: str, palette: bool, colour: str, split: str = "train") -> dict[str, Any]:
    body = _BODIES.get(concept, BANANA).format(c=colour)
    return {
        "id": f"{icon_set}:{concept}",
        "set": icon_set,
        "style": style,
        "licence": "MIT",
        "name": concept,
        "phrase": concept,
        "keywords": ["thing"],
        "group": "objects",
        "palette": palette,
        "concept": concept,
        "hex": "1F34E" if style.endswith("emoji") else "",
        "tone": 0,
        "junk": "",
        "lex": "noun.artifact",
        "colors": ["red"] if palette else [],
        "recolour": not palette or icon_set == "icon-park",
        "split": split,
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">{body}</svg>',
        "img": None,
    }


def icon_rows() -> list[dict[str, Any]]:
    """Four concepts in six looks for training; one style cell, one concept and one cell of validation held out."""
    rows = [row(concept, *look) for concept in _BODIES for look in _LOOKS]
    for held in rows:
        if held["id"] == "twemoji:cat":
            held["split"] = "style"
        if held["id"] == "tabler:bus":
            held["split"] = "val"
    return rows + [row("banana", *look, split="concept") for look in _LOOKS]


def word_tokenizer(folder: Path) -> Path:
    """A tokenizer that counts words and marks, as a file."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path
