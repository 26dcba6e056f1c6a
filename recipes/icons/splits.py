"""What is held out of training: whole concepts, (concept, style) cells, and a random 2 % of cells."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from recipes.icons.table import Icon
from recipes.icons.wordnet import DEPICTABLE, WordNet

_STYLE_CELLS = 900
_VALIDATION = 50


def _hash(text: str) -> int:
    return int(hashlib.sha1(text.encode()).hexdigest()[:8], 16)


def held_concepts() -> list[str]:
    """The concepts that no training caption names, from `holdout.json`."""
    loaded: dict[str, list[str]] = json.loads((Path(__file__).parent / "holdout.json").read_text(encoding="utf-8"))
    return loaded["concepts"]


def name_concepts(icons: Sequence[Icon], wordnet: WordNet) -> None:
    """Give emoji the concept of interface icons of the same thing, and each concept its commonest word as its name."""
    for icon in icons:
        if icon.source == "emoji" and not icon.group.startswith("flags"):
            words = icon.phrase.replace("-", " ")
            key = words.replace(" ", "_")
            if wordnet.is_noun(key) or ("_" not in key and wordnet.singular(key)):
                icon.concept = wordnet.concept(words)
    words_of: dict[str, Counter[str]] = defaultdict(Counter)
    for icon in icons:
        if icon.concept.startswith("@"):
            words = re.sub(r"^crossed-out | (with|in) an? .*$", "", icon.phrase).replace("-", " ")
            key = words.replace(" ", "_")
            word = words if wordnet.is_noun(key) else (wordnet.singular(key) or words).replace("_", " ")
            words_of[icon.concept][word] += 3 if icon.source == "emoji" else 1
    for icon in icons:
        if icon.concept in words_of:
            icon.concept = words_of[icon.concept].most_common(1)[0][0]


def _words(phrase: str, wordnet: WordNet) -> set[str]:
    return {wordnet.singular(word) or word for word in re.findall("[a-z]+", phrase)}


def _hold_concepts(icons: Sequence[Icon], wordnet: WordNet, concepts: Sequence[str]) -> None:
    """Every icon of a held concept, and every icon whose phrase holds its words, goes out, whatever its style."""
    rows_of_word: dict[str, list[tuple[Icon, set[str]]]] = defaultdict(list)
    rows_of_concept: dict[str, list[Icon]] = defaultdict(list)
    for icon in icons:
        words = _words(icon.phrase, wordnet)
        rows_of_concept[icon.concept].append(icon)
        for word in words:
            rows_of_word[word].append((icon, words))
    for concept in concepts:
        parts = {wordnet.singular(word) or word for word in concept.split()}
        last = concept.split()[-1]
        for icon, words in rows_of_word[wordnet.singular(last) or last]:
            if parts <= words:
                icon.split = "concept"
        for icon in rows_of_concept[concept]:
            icon.split = "concept"


def _hold_styles(icons: Sequence[Icon], wordnet: WordNet) -> None:
    """One style of each of 900 concepts that at least four styles draw."""
    with_emoji = {icon.concept for icon in icons if icon.hex and not icon.group.startswith(("flags", "symbols"))}
    rows_of: dict[str, list[Icon]] = defaultdict(list)
    for icon in icons:
        if not icon.split:
            rows_of[icon.concept].append(icon)

    def drawable(concept: str) -> bool:
        kinds = wordnet.lexnames(concept.replace(" ", "_"))
        return concept in with_emoji or (bool(kinds) and kinds[0] in DEPICTABLE)

    concepts = [c for c, rows in rows_of.items() if len({row.style for row in rows}) >= 4 and drawable(c)]
    for concept in sorted(concepts, key=lambda c: _hash(f"style|{c}"))[:_STYLE_CELLS]:
        styles = sorted({row.style for row in rows_of[concept]})
        held = styles[_hash(f"pick|{concept}") % len(styles)]
        for row in rows_of[concept]:
            if row.style == held:
                row.split = "style"


def split(icons: Sequence[Icon], wordnet: WordNet, concepts: Sequence[str]) -> None:
    """Set `split` of every icon to "train", "val", "style" or "concept"; held words leave all other keywords too."""
    _hold_concepts(icons, wordnet, concepts)
    _hold_styles(icons, wordnet)
    held_word = re.compile(r"\b(" + "|".join(map(re.escape, concepts)) + r")(s|es)?\b")
    for icon in icons:
        if not icon.split:
            icon.split = "val" if _hash(f"val|{icon.concept}{icon.style}") % _VALIDATION == 0 else "train"
        if held_word.search(icon.phrase):
            icon.split = "concept"
        if icon.split != "concept":
            icon.keywords = [keyword for keyword in icon.keywords if not held_word.search(keyword)]
