"""From an icon's name to words: style affixes off, words split, a noun phrase, whether it is worth a caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from recipes.icons.iconify import Iconify
from recipes.icons.vocabulary import (
    ABSTRACT,
    BRAND_SETS,
    BRANDS,
    CAREFUL_SUFFIXES,
    COMMON,
    FUNCTION_WORDS,
    LOOSE_MODIFIERS,
    MODIFIERS,
    NEW_WORDS,
    NO_HEAD,
    ORDINARY_BRANDS,
    SET_SUFFIXES,
    STYLE_SUFFIXES,
)
from recipes.icons.wordnet import DEPICTABLE, WordNet

_BRAND_WORD = re.compile(r"(^|-)(logo|logos|brand|brands)(-|$)")
_CHARACTERS = re.compile(
    r"^(letter)-([a-z]{1,2}|circle|square|case|spacing|hexagon)(-|$)"
    r"|^(number|digit|num|alpha|numeric|counter|keycap|roman-numeral|hiragana|katakana)(-|$)"
    r"|^[a-z0-9]$|^\d+(-|$)|^\d+[a-z]{1,2}$"
    r"|(^|-)(h[1-6]|uppercase|lowercase|superscript|subscript)(-|$)|currency-|dice-\d|^abstract-\d"
)
_VARIANT_NUMBER = re.compile(r"-(\d{1,2}|one|two|three|four|five|i|ii)$")
# Here a number says what the icon shows.
_COUNTED = re.compile(
    r"(^|-)(number|letter|counter|timer|clock|rating|dice|die|h|page|domino|gauge|zone|battery|wind-beaufort|uv-index"
    r"|numeric|roman|level|grade|time|wifi-strength|signal)(-|$)"
)
_DIRECTIONS = {"up", "down", "left", "right"}
_POINTERS = {
    *("arrow", "arrows", "chevron", "chevrons", "angle", "angles", "point", "caret", "carets"),
    *("double", "finger", "hand", "pointing", "triangle"),
}
# Modifiers that stay modifiers even where WordNet knows the compound.
_PLAIN_MODIFIERS = {"off", "slash", "plus", "minus", "check", "x"}


@dataclass(frozen=True)
class Name:
    """What a name says. `junk` is empty, or why it is not worth a caption: brand, alnum, abstract or unknown."""

    phrase: str
    base: str = ""
    lex: str = ""
    junk: str = ""


def _without(name: str, suffixes: Sequence[str]) -> str:
    """The name without the suffixes that it ends in, each tried once in turn."""
    for suffix in suffixes:
        if name.endswith(f"-{suffix}") and len(name) > len(suffix) + 1:
            name = name[: -len(suffix) - 1]
    return name


def strip_style(icon_set: str, name: str, suffixes: Sequence[str], prefixes: Sequence[str]) -> str:
    """The name without the style words that its set declares or that are usual, and without variant numbers."""
    for suffix in sorted((s for s in suffixes if s), key=len, reverse=True):
        if name.endswith(f"-{suffix}"):
            name = name[: -len(suffix) - 1]
            break
    for prefix in (p for p in prefixes if p):
        if name.startswith(f"{prefix}-"):
            name = name[len(prefix) + 1 :]
            break
    own = SET_SUFFIXES.get(icon_set, ())
    general = [s for s in STYLE_SUFFIXES if s not in CAREFUL_SUFFIXES or s in own]
    while True:
        shorter = _without(_without(name, general), own)
        number = None if _COUNTED.search(shorter) else _VARIANT_NUMBER.search(shorter)
        if number and len(shorter) > len(number.group(0)):
            shorter = shorter[: number.start()]
        if shorter == name:
            return name
        name = shorter


class Namer:
    """Turns names into words with WordNet's nouns and the brands that the brand sets list."""

    def __init__(self, wordnet: WordNet, iconify: Iconify):
        self.wordnet = wordnet
        self._unambiguous = {b for b in BRANDS if not wordnet.is_noun(b) and b not in wordnet.other_words}
        self._listed_brands = self._brands(iconify)

    def _brands(self, iconify: Iconify) -> set[str]:
        found = set()
        for name in BRAND_SETS:
            for icon in iconify.load(name)["icons"]:
                brand = re.sub(r"-(logo|icon|wordmark|plain|line|original|block|solid|\d+)\b", "", icon)
                if len(brand) > 2 and not all(self.known(word) for word in brand.split("-")):
                    found.add(brand)
        return found - {"letter", "counter"}

    def known(self, word: str) -> bool:
        """Whether a word is English or usual in icon names."""
        net = self.wordnet
        listed = word in NEW_WORDS or word in FUNCTION_WORDS
        return listed or net.is_noun(word) or word in net.other_words or net.singular(word) is not None

    def split(self, token: str, most: int) -> list[str]:
        """A run-together token as at most `most` known words, the fewest and longest; or itself."""
        if self.known(token) or len(token) < 5:
            return [token]
        best: dict[int, tuple[float, list[str]]] = {0: (0.0, [])}
        for end in range(1, len(token) + 1):
            for start in range(max(0, end - 16), end):
                word = token[start:end]
                usable = (
                    (len(word) >= 3 and self.known(word)) or (len(word) > 1 and word in FUNCTION_WORDS) or word == "x"
                )
                if start not in best or not usable:
                    continue
                cost = best[start][0] + 1 + (0.6 if len(word) < 4 else 0)
                if end not in best or cost < best[end][0]:
                    best[end] = (cost, [*best[start][1], word])
        words = best.get(len(token), (0.0, [token]))[1]
        return words if len(words) <= most else [token]

    def head(self, tokens: Sequence[str]) -> tuple[str, str] | None:
        """The longest noun in the tokens, the last one of equals, as (kind of thing, "" if it cannot be drawn)."""
        for length in range(min(4, len(tokens)), 0, -1):
            for start in range(len(tokens) - length, -1, -1):
                found = self._head_of(list(tokens[start : start + length]))
                if found is not None:
                    return found
        for word in reversed(tokens):
            lexnames = self.wordnet.lexnames(self.wordnet.singular(word) or word)
            if lexnames:
                return lexnames[0], ""
        return None

    def _head_of(self, words: list[str]) -> tuple[str, str] | None:
        net = self.wordnet
        single = words[-1] if len(words) == 1 else None
        if single in NO_HEAD:
            return None
        if single is not None and (single in COMMON or single in NEW_WORDS):
            kinds = net.lexnames(single) or net.lexnames(net.singular(single) or "")
            drawable = [kind for kind in kinds if kind in DEPICTABLE]
            return (drawable or ["noun.artifact"])[0], "drawable"
        candidates = ["_".join(words), "_".join([*words[:-1], net.singular(words[-1]) or words[-1]]), "-".join(words)]
        if single is None:
            candidates.append("".join(words))
        for candidate in candidates:
            if not net.is_noun(candidate) or (single is not None and len(candidate) < 2):
                continue
            kinds = net.lexnames(candidate)[:3]
            drawable = [kind for kind in kinds if kind in DEPICTABLE]
            if drawable:
                return drawable[0], "drawable"
            if single is None:
                return kinds[0], ""
        return None

    def _is_brand(self, core: str) -> bool:
        tokens = core.split("-")
        return (
            bool(_BRAND_WORD.search(core))
            or core in self._listed_brands
            or (core in BRANDS and core not in ORDINARY_BRANDS)
            or any(token in self._listed_brands or token in self._unambiguous for token in tokens if token)
        )

    def analyse(self, core: str, most_words: int = 2) -> Name:
        """What a name without its style words says; run-together words are split into at most `most_words`."""
        plain = core.replace("-", " ")
        if self._is_brand(core):
            return Name(plain, junk="brand")
        if _CHARACTERS.search(core):
            return Name(plain, junk="alnum")
        tokens = [word for token in core.split("-") if token for word in self.split(token, most_words)]
        unknown = [token for token in tokens if not self.known(token) and not token.isdigit()]
        if not tokens or len(unknown) * 2 > len(tokens):
            return Name(" ".join(tokens), junk="unknown")
        base, modifiers = self._modifiers(tokens)
        skipped = (ABSTRACT, FUNCTION_WORDS, LOOSE_MODIFIERS)
        concrete = [t for t in base if not any(t in words for words in skipped) and not t.isdigit()]
        head = self.head(concrete) if concrete else None
        junk = "" if head is not None and head[1] else "abstract"
        if unknown and not junk and len(unknown) * 2 >= len(tokens):
            junk = "unknown"
        return Name(_phrase(base, modifiers), " ".join(base), head[0] if head else "", junk)

    def _modifiers(self, tokens: Sequence[str]) -> tuple[list[str], list[str]]:
        base, modifiers = list(tokens), []
        while len(base) > 1 and base[-1] in MODIFIERS:
            if self.wordnet.is_noun("_".join(base[-2:])) and base[-1] not in _PLAIN_MODIFIERS:
                break
            modifiers.insert(0, base.pop())
        return base, modifiers


def _phrase(base: Sequence[str], modifiers: Sequence[str]) -> str:
    phrase = " ".join(base)
    if len(modifiers) > 1:
        if all(word in _DIRECTIONS for word in modifiers):
            phrase, modifiers = " ".join([phrase, *modifiers]), []
        else:
            phrase, modifiers = " ".join([phrase, *modifiers[:-1]]), modifiers[-1:]
    for word in modifiers:
        if word in _DIRECTIONS and base and base[-1] in _POINTERS:
            phrase = f"{phrase} pointing {word}"
        else:
            phrase = MODIFIERS[word].format(phrase)
    phrase = re.sub(r"\bin in a\b", "in a", phrase)
    return re.sub(r"\b(with|and|on|of) with\b", "with", phrase)
