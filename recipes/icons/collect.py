"""The icons of all sets as rows: drawing, words, licence; only what cannot be named or used is left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onestill.errors import DataError
from recipes.icons.emoji import Emoji, EmojiNames, normal
from recipes.icons.iconify import Iconify
from recipes.icons.names import Namer, strip_style
from recipes.icons.packages import EMOJIBASE, EMOJILIB, FLUENT_3D, ICONIFY, WORDNET, unpacked
from recipes.icons.sets import CATEGORY_SETS, COLOUR, EMOJI, FLAGS, LICENCES, MONO, MORE_CATEGORIES, WITHOUT_TONES
from recipes.icons.table import Icon
from recipes.icons.wordnet import WordNet

FLUENT_3D_CREDIT = {
    "name": "Fluent Emoji 3D",
    "author": "Microsoft Corporation (packaged by LobeHub)",
    "licence": "MIT",
}


@dataclass
class Sources:
    """The unpacked packages, read."""

    iconify: Iconify
    wordnet: WordNet
    namer: Namer
    emoji: EmojiNames
    fluent_3d: Path

    @classmethod
    def open(cls, folder: Path) -> Sources:
        """Read the folder that `fetch.py` filled."""
        iconify = Iconify(unpacked(folder, ICONIFY))
        wordnet = WordNet(unpacked(folder, WORDNET))
        emoji = EmojiNames(unpacked(folder, EMOJIBASE), unpacked(folder, EMOJILIB), iconify)
        return cls(iconify, wordnet, Namer(wordnet, iconify), emoji, unpacked(folder, FLUENT_3D) / "assets")


class Collector:
    """Yields the rows of every set; `dropped` counts what was left out, by reason."""

    def __init__(self, sources: Sources):
        self.sources = sources
        self.dropped: Counter[str] = Counter()

    def icons(self) -> Iterator[Icon]:
        """All icons but the clip art. The order matters: of two alike, the first one stays."""
        for name in EMOJI:
            yield from self._emoji_set(name)
        yield from self._fluent_3d()
        for name in FLAGS:
            yield from self._flag_set(name)
        for name in COLOUR:
            yield from self._colour_set(name)
        for name in MONO:
            yield from self._mono_set(name)

    def _licence(self, name: str) -> str:
        licence = self.sources.iconify.licence(name)
        if licence not in LICENCES:
            raise DataError(
                f"The set {name} is under {licence}, which this recipe does not take: leave it out of sets.py."
            )
        return licence

    def _emoji_icon(self, icon_set: str, icon: str, emoji: Emoji, style: str, palette: bool, licence: str) -> Icon:
        return Icon(
            id=f"{icon_set}:{icon}",
            set=icon_set,
            style=style,
            licence=licence,
            name=emoji.label,
            phrase=emoji.phrase,
            concept=emoji.phrase,
            group=emoji.group,
            palette=palette,
            source="emoji",
            keywords=list(emoji.keywords),
            hex=emoji.base,
            tone=max(emoji.tones, default=0),
        )

    def _emoji_set(self, name: str) -> Iterator[Icon]:
        style, palette = EMOJI[name]
        licence, iconify = self._licence(name), self.sources.iconify
        codes = self.sources.emoji.codes_of(name)
        for icon in iconify.visible(name):
            emoji = self.sources.emoji.resolve(name, icon, codes)
            if emoji is None:
                words = self.sources.namer.analyse(re.sub(r"-(1|2|3)$", "", icon), most_words=4)
                if words.junk:
                    self.dropped[f"{name}: no name"] += 1
                    continue
                row = Icon(
                    f"{name}:{icon}",
                    name,
                    style,
                    licence,
                    words.phrase,
                    words.phrase,
                    words.phrase,
                    "",
                    palette,
                    "emoji",
                )
            elif emoji.tones and name in WITHOUT_TONES:
                self.dropped[f"{name}: skin tone"] += 1
                continue
            elif "regional indicator" in emoji.label:
                continue
            else:
                row = self._emoji_icon(name, icon, emoji, style, palette, licence)
            row.svg = iconify.svg(name, icon)
            yield row

    def _fluent_3d(self) -> Iterator[Icon]:
        for path in sorted(self.sources.fluent_3d.iterdir()):
            emoji = self.sources.emoji.emoji.get(normal(path.stem.replace("_", "-")))
            # The origin of its flags is unclear.
            if emoji is None or emoji.tones or emoji.group.startswith("flag") or "regional" in emoji.label:
                self.dropped["fluent-emoji-3d"] += 1
                continue
            row = self._emoji_icon("fluent-emoji-3d", path.stem, emoji, "fluent 3d emoji", True, "MIT")
            row.img = path.read_bytes()
            yield row

    def _flag_set(self, name: str) -> Iterator[Icon]:
        licence = self._licence(name)
        for icon in self.sources.iconify.visible(name):
            if icon.endswith("-1x1"):
                continue
            emoji = self.sources.emoji.flag(re.sub(r"-(4x3)$", "", icon))
            if emoji is None:
                self.dropped[f"{name}: no country"] += 1
                continue
            row = self._emoji_icon(name, icon, emoji, FLAGS[name], True, licence)
            row.svg = self.sources.iconify.svg(name, icon)
            yield row

    def _category_slugs(self, name: str) -> list[str]:
        if name not in CATEGORY_SETS:
            return []
        data = self.sources.iconify.load(name)
        slugs = {re.sub("[^a-z]+", "-", c.lower()).strip("-") for c in (data.get("categories") or {})}
        used = {slug for slug in slugs if any(icon.startswith(f"{slug}-") for icon in data["icons"])}
        return sorted(used | set(MORE_CATEGORIES.get(name, ())), key=lambda slug: (-len(slug), slug))

    def _interface_set(self, name: str, styles: list[tuple[str, str]], palette: bool) -> Iterator[Icon]:
        """The rows of (icon, style) pairs of an interface set."""
        iconify, namer = self.sources.iconify, self.sources.namer
        licence, categories, aliases = self._licence(name), iconify.categories(name), iconify.aliases(name)
        suffixes, prefixes = iconify.affixes(name)
        slugs = self._category_slugs(name)
        for icon, style in styles:
            core = strip_style(name, icon, suffixes, prefixes)
            slug = next((s for s in slugs if core.startswith(f"{s}-") and len(core) > len(s) + 2), None)
            core = core if slug is None else core[len(slug) + 1 :]
            words = namer.analyse(core)
            keywords = []
            for alias in aliases.get(icon, ()):
                keyword = strip_style(name, alias, suffixes, prefixes).replace("-", " ")
                new = keyword not in keywords and keyword != core.replace("-", " ")
                if new and len(keyword) > 2 and not re.search(r"\d", keyword):
                    keywords.append(keyword)
            category = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", categories.get(icon, "")).lower()
            concept = self.sources.wordnet.concept(words.base) if words.base and not words.junk else words.phrase
            yield Icon(
                id=f"{name}:{icon}",
                set=name,
                style=style,
                licence=licence,
                name=core.replace("-", " "),
                phrase=words.phrase,
                concept=concept,
                group=category,
                palette=palette,
                source="interface",
                keywords=keywords[:8],
                junk=words.junk,
                lex=words.lex,
                svg=iconify.svg(name, icon),
            )

    def _colour_set(self, name: str) -> Iterator[Icon]:
        style, flat = COLOUR[name]
        icons = list(self.sources.iconify.visible(name))
        if name == "fluent-color":
            icons = _largest(icons, r"(?P<what>.*)-(?P<size>\d+)")
        styles = [(icon, flat if re.search(r"-(flat|duo)$", icon) else style) for icon in icons]
        yield from self._interface_set(name, styles, True)

    def _mono_set(self, name: str) -> Iterator[Icon]:
        icons = list(self.sources.iconify.visible(name))
        if name == "fluent":
            icons = _largest(icons, r"(?P<what>.*)-(?P<size>\d+)-(?P<style>filled|regular)")
        styles = [(icon, style) for icon in icons if (style := MONO[name](icon)) is not None]
        yield from self._interface_set(name, styles, False)


def _largest(icons: list[str], pattern: str) -> list[str]:
    """Of the icons that differ in size alone, the largest."""
    best: dict[tuple[str, ...], tuple[int, str]] = {}
    for icon in icons:
        match = re.fullmatch(pattern, icon)
        if match is None:
            continue
        key = tuple(value for group, value in match.groupdict().items() if group != "size")
        size = int(match["size"])
        if key not in best or size > best[key][0]:
            best[key] = (size, icon)
    return [icon for _, icon in best.values()]
