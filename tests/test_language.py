"""Code and documentation use the words of the field: words that meant something only in this project stay out.

Checked are the prose of pages, and in Python files comments, docstrings, other texts and identifiers.
"""

from __future__ import annotations

import io
import re
import token
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COVERED = (
    "*.md",
    ".github/**/*.yml",
    "docs/**/*.md",
    "docs/*.py",
    "recipes/*/README.md",
    "recipes/icons/card.md",
    "benchmarks/README.md",
    "src/onestill/**/*.py",
)

# A word or phrase, as a regular expression that matches whole words in any case -> what to write instead.
PHRASES = {
    r"(is|are|was|were|be|been|being|unless|not) told": "receives, is conditioned on; by default",
    r"told (so|apart|by|of|not|in)": "conditioned, distinguished",
    r"tells? nothing apart": "distinguish",
    r"tap|taps|tapped": "feature, feature layer",
    r"token numbers?": "token ids",
    r"kept (networks|cache|form|graphs?)|(networks|graphs) (are|were) kept": "cached",
    r"words (to|become|into) pixels": "prompts to pixels",
    r"(from|by) words( alone)?": "from a prompt",
    r"newest words|new words (for|win)": "new prompt",
    r"follow(s|ed|ing)? the words'?": "follow the prompt",
    r"(took|take|by|fair|each|their) turns?": "alternate, fair queue, optimization step",
    r"(student|discriminator|heads|player|other)'?s'? turns?": "update of the student, of the discriminator",
    r"(the )?pace|paces": "rate limit",
    r"sees? the view|the views?|a view of": "discriminator inputs",
    r"walk|walks|walked": "sampling loop, step table, pass",
    r"(a|the) front": "proxy",
    r"once more in the open": "leave it out",
    r"whence": "source",
    r"to be had": "available",
    r"numbers that are (none|not)|(picture|image) that is none|computed no picture": "NaN or infinity",
    r"when nothing is said": "by default",
    r"at hand|in hand": "available, unanswered",
    r"(go|goes|going|went|gone) on from": "continue from, resume",
    r"asked? again": "repeat the request",
    r"all is well|all went well": "everything works, success",
    r"eyes of the evaluation|evaluation's eyes": "feature network",
    r"what holds it|held by": "tests, checked by",
    r"memory runs out|no memory for": "out of memory",
    r"letters that cannot be seen": "invisible characters",
}
# One part of an identifier, such as `told` of `memory_told` -> what to write instead.
PARTS = {
    "told": "conditioning, passed, options",
    "taps": "features",
    "pace": "rate_limit",
    "views": "discriminator_inputs",
    "turns": "fair_queue, optimization",
    "walk": "step_table",
    "fresh": "noise_std",
    "front": "proxy",
}
SPACE = re.compile(r"\s+")
PROSE = {phrase: re.compile(rf"\b(?:{phrase})\b", re.IGNORECASE) for phrase in PHRASES}
TEXTS = (token.STRING, getattr(token, "FSTRING_MIDDLE", token.STRING))
FILES = sorted({path for pattern in COVERED for path in ROOT.glob(pattern)})


def found(text: str) -> list[str]:
    """Each phrase of the list that stands in a text, with what to write instead."""
    text = SPACE.sub(" ", text)
    return [
        f"'{text[max(0, match.start() - 30) : match.end() + 30]}': {PHRASES[phrase]}"
        for phrase, pattern in PROSE.items()
        for match in pattern.finditer(text)
    ]


def in_python(source: str) -> Iterator[str]:
    """The same for the comments, texts and identifiers of a Python file."""
    comments: list[str] = []
    for piece in tokenize.generate_tokens(io.StringIO(source).readline):
        if piece.type == token.NAME:
            for part in set(piece.string.lower().split("_")) & PARTS.keys():
                yield f"line {piece.start[0]}, '{piece.string}': {PARTS[part]}"
        elif piece.type in TEXTS:
            yield from (f"line {piece.start[0]}, {hit}" for hit in found(piece.string))
        elif piece.type == token.COMMENT:
            comments.append(piece.string.lstrip("# "))
    yield from found(" ".join(comments))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_uses_the_words_of_the_field(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not list(in_python(text) if path.suffix == ".py" else found(text))


def test_the_list_finds_what_it_should() -> None:
    assert len(found("A network is told the prompt.")) == 1
    assert not found("A network receives the prompt.")
    code = 'memory_told = 1  # one\n# walk\n"""What is\ntold."""\n'
    assert len(list(in_python(code))) == 3
