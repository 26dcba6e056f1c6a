"""Emoji names: code points -> name, keywords, group, skin tone; an icon's name -> code points."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.icons.iconify import Iconify

# Sets whose names stand beside code points. Of openmoji only this table is read, none of its pictures.
_NAMED_SETS = ("noto", "twemoji", "openmoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")
_UK_PARTS = ("gb-eng", "gb-sct", "gb-wls")
_KEYWORD = re.compile(r"[a-z][a-z '\-]+")


@dataclass(frozen=True)
class Emoji:
    """One emoji. `code` and `base` are hex code points joined by hyphens; `base` is the form without skin tone."""

    code: str
    base: str
    label: str
    base_label: str
    keywords: tuple[str, ...]
    group: str
    tones: tuple[int, ...]

    @property
    def phrase(self) -> str:
        """The name as a noun phrase in lower case."""
        phrase = re.sub(r"^flag: ", "flag of ", self.base_label)
        return re.sub(r"^keycap: (.*)", r"keycap \1", phrase).lower()


def normal(code: str) -> str:
    """Hex code points in upper case without the variation selectors, which sets write or leave out at will."""
    return "-".join(part for part in code.upper().split("-") if part not in ("FE0F", "FE0E"))


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _slug(text: str) -> str:
    text = text.lower().replace("&", "and").replace("’", "").replace("'", "")  # noqa: RUF001 - the names hold this apostrophe
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


class EmojiNames:
    """The names of all emoji, from the unpacked packages emojibase-data and emojilib and from the sets' own tables."""

    def __init__(self, emojibase: Path, emojilib: Path, iconify: Iconify):
        self.iconify = iconify
        self.emoji: dict[str, Emoji] = {}
        self._read(emojibase / "en", emojilib / "dist" / "emoji-en-US.json")
        self._by_slug: dict[str, str] = {}
        for code, emoji in self.emoji.items():
            self._by_slug.setdefault(_slug(emoji.label), code)
        for name in _NAMED_SETS:
            self._read_set(name)
        self._by_letters: dict[str, str] = {}
        for slug, code in self._by_slug.items():
            self._by_letters.setdefault(_squash(slug), code)
        for code in self.emoji:
            unicode_name = "" if "-" in code else unicodedata.name(chr(int(code, 16)), "")
            if unicode_name:
                self._by_letters.setdefault(_squash(unicode_name), code)
        self._flat = self.codes_of("fluent-emoji-flat")

    def _read(self, folder: Path, keywords: Path) -> None:
        messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
        groups = {group["order"]: group["message"] for group in messages["groups"]}
        subgroups = {group["order"]: group["message"] for group in messages["subgroups"]}
        more: dict[str, list[str]] = {
            normal("-".join(f"{ord(c):04X}" for c in emoji)): words
            for emoji, words in json.loads(keywords.read_text(encoding="utf-8")).items()
        }

        def add(entry: Mapping[str, Any], base: Mapping[str, Any]) -> None:
            code, base_code = normal(entry["hexcode"]), normal(base["hexcode"])
            words = [*base.get("tags", []), *(word.replace("_", " ") for word in more.get(base_code, []))]
            tone = entry.get("tone") or []
            group, subgroup = groups.get(base.get("group"), "component"), subgroups.get(base.get("subgroup"), "")
            self.emoji[code] = Emoji(
                code,
                base_code,
                entry["label"],
                base["label"],
                tuple(word for word in dict.fromkeys(words) if _KEYWORD.fullmatch(word)),
                f"{group} / {subgroup}" if subgroup else group,
                tuple(tone) if isinstance(tone, list) else (tone,),
            )

        for entry in json.loads((folder / "data.json").read_text(encoding="utf-8")):
            add(entry, entry)
            for skin in entry.get("skins", []):
                add(skin, entry)

    def _read_set(self, name: str) -> None:
        aliases: dict[str, list[str]] = {}
        for alias, value in self.iconify.load(name).get("aliases", {}).items():
            aliases.setdefault(value.get("parent"), []).append(alias)
        for code_points, icon in self.iconify.code_points(name).items():
            code = normal(code_points)
            if code in self.emoji:
                for slug in (icon, *aliases.get(icon, ())):
                    self._by_slug.setdefault(slug, code)

    def codes_of(self, name: str) -> dict[str, str]:
        """Icon -> code of a set that has a table of code points."""
        found: dict[str, str] = {}
        for code_points, icon in self.iconify.code_points(name).items():
            found.setdefault(icon, normal(code_points))
        return found

    def resolve(self, icon_set: str, icon: str, codes: Mapping[str, str]) -> Emoji | None:
        """The emoji that an icon draws; `codes` is what `codes_of` gave for its set."""
        code = codes.get(icon)
        if code in self.emoji:
            return self.emoji[code]
        if icon_set == "fluent-emoji" and self._flat.get(icon) in self.emoji:
            return self.emoji[self._flat[icon]]
        unnumbered = re.sub(r"-\d$", "", icon)
        guesses = (
            icon,
            unnumbered,
            re.sub(r"^flag-for-", "flag-", icon),
            icon.replace("-for-", "-"),
            re.sub(r"^flag-for-flag-", "flag-", icon),
            icon.replace("-and-", "-"),
            re.sub(r"-(button|face|sign|symbol)$", "", icon),
            f"{icon}-button",
            f"{icon}-face",
            f"{icon}-symbol",
            f"flag-{unnumbered}",
        )
        for guess in guesses:
            code = self._by_slug.get(guess) or self._by_letters.get(_squash(guess))
            if code is not None:
                return self.emoji[code]
        return None

    def flag(self, country: str) -> Emoji | None:
        """The flag of a two-letter country or a part of the United Kingdom; None for what is neither."""
        letters = country.upper()
        if re.fullmatch("[A-Z]{2}", letters):
            return self.emoji.get("-".join(f"{0x1F1E6 + ord(letter) - 65:X}" for letter in letters))
        if country in _UK_PARTS:
            tags = "-".join(f"E00{ord(letter):02X}" for letter in country.replace("-", ""))
            return self.emoji.get(normal(f"1F3F4-{tags}-E007F"))
        return None
