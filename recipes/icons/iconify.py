"""The Iconify package: sets of icons as JSON, an icon as a square SVG."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


class Iconify:
    """The unpacked package; sets are read once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.load = functools.cache(self._load)

    def _load(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "json" / f"{name}.json").read_text(encoding="utf-8"))
        return loaded

    def visible(self, name: str) -> Iterator[str]:
        """The names of a set's icons, without those that its author has withdrawn."""
        for icon, value in self.load(name)["icons"].items():
            if not value.get("hidden"):
                yield icon

    def svg(self, name: str, icon: str) -> str:
        """An icon as SVG text with a square view box."""
        data = self.load(name)
        value = data["icons"][icon]

        def measure(key: str, default: float) -> float:
            return float(value.get(key, data.get(key, default)))

        left, top, width, height = (measure(k, d) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16)))
        side = max(width, height)
        box = " ".join(_number(v) for v in (left - (side - width) / 2, top - (side - height) / 2, side, side))
        head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox='
        return f'{head}"{box}">{value["body"]}</svg>'

    def licence(self, name: str) -> str:
        """The SPDX name of a set's licence."""
        return str(self.load(name)["info"]["license"]["spdx"])

    def attribution(self, name: str) -> dict[str, str]:
        """Who made a set, and under which licence it is."""
        info = self.load(name)["info"]
        licence = info["license"]
        found = {"name": info["name"], "author": info["author"]["name"], "licence": licence["spdx"]}
        return {**found, "url": licence["url"]} if licence.get("url") else found

    def affixes(self, name: str) -> tuple[list[str], list[str]]:
        """The style suffixes and prefixes that a set declares."""
        data = self.load(name)
        return list(data.get("suffixes") or {}), list(data.get("prefixes") or {})

    def categories(self, name: str) -> dict[str, str]:
        """Icon -> its category."""
        found: dict[str, str] = {}
        for category, icons in (self.load(name).get("categories") or {}).items():
            for icon in icons:
                found.setdefault(icon, category)
        return found

    def aliases(self, name: str) -> dict[str, list[str]]:
        """Icon -> its other names; a turned or mirrored icon is another picture and no alias."""
        found: dict[str, list[str]] = defaultdict(list)
        for alias, value in self.load(name).get("aliases", {}).items():
            if not any(key in value for key in ("rotate", "hFlip", "vFlip")):
                found[value["parent"]].append(alias)
        return found

    def code_points(self, name: str) -> dict[str, str]:
        """Code points, e.g. "1f34e" -> icon, for the emoji sets that have such a table."""
        return dict(self.load(name).get("chars", {}))
