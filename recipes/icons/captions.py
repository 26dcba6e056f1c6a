"""Captions by rule: what a drawn icon is called. They take a `random.Random`, so that a seed names a caption."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from recipes.icons.everyday import everyday_names

Row = Mapping[str, Any]

TONES = {
    1: "light skin tone",
    2: "medium-light skin tone",
    3: "medium skin tone",
    4: "medium-dark skin tone",
    5: "dark skin tone",
}
SHAPES = ("heart", "star", "circle", "square", "triangle")
_PLURAL = re.compile(r"[^su]s$")
_VOWEL = re.compile(r"^(hour|(?!one\b|euro|ew|eu)[aeio]|u(?!ni|se|ti|k))", re.I)
_SINGULAR = set(
    "bus cactus lens canvas compass glass dress atlas gas iris virus octopus walrus tennis chess mattress".split()
)
_UNCOUNTABLE = set(
    "rain snow fire fog lightning water money music bread rice bacon cheese butter salt honey ice popcorn hot soup "
    "spaghetti sushi cooked curry tea coffee milk broccoli garlic ginger confetti luggage camping radioactive fishing "
    "hiking swimming surfing skiing people men women children".split()
)
_STARTS = {"a", "an", "the", "two", "three", "four", "five", "six", "many"}
_COLOUR_WORD = re.compile(
    r"\b(light |dark )?(red|blue|green|yellow|purple|black|white|brown|orange|grey|gray|pink|golden|gold)"
    r"(?= (?!slice|half|juice)\w)\s*"
)
_STYLE_PHRASES = {
    "broken line": "broken-line icon",
    "offset print": "offset-print icon",
    "pencil line": "pencil-line icon",
    "block": "blocky icon",
    "solid emoji": "solid emoji icon",
    "stencil emoji": "stencil emoji icon",
}
_COMPLETE_STYLES = ("emoji", "twemoji", "emojione", "clip art", "flag", "line art", "badge", "sticker")
_OTHER_STYLE_NAMES = {
    "fluent 3d emoji": ("3d", "3d emoji", "3d icon"),
    "fluent flat emoji": ("flat emoji", "flat"),
    "fluent gradient emoji": ("gradient emoji",),
    "outlined cartoon emoji": ("cartoon emoji",),
    "outline": ("line icon", "outlined"),
    "solid": ("glyph", "silhouette icon"),
    "pixel art": ("pixel art",),
}
# (weight, template): a is the phrase with its article, p without, s the style, f and b the colours.
_STYLED_TEMPLATES = (
    (50, "{a}, {s}"),
    (14, "{p}, {s}"),
    (10, "{s} of {a}"),
    (6, "{s_a} of {a}"),
    (5, "{p} {s}"),
    (5, "{a}, {s} style"),
    (4, "{s}: {p}"),
    (3, "{a} as {s_a}"),
    (3, "{a} in the {s} style"),
)
_PLAIN_TEMPLATES = ((70, "{a}"), (30, "{p}"))
# How often a picture in the default look goes without a word about its style. No other picture ever does: words without
# a style always draw the same, the prettiest one.
PLAIN_SHARE = 0.6
EVERYDAY_SHARE = 0.45
_WHITE_TEMPLATES = (
    (40, "{fp_a}, {s}"),
    (15, "{f} {p}, {s}"),
    (20, "{s} of {a} in {f}"),
    (10, "{a}, {f} {s}"),
    (15, "{a}, {s}, {f} on white"),
)
_BLACK_TEMPLATES = ((60, "{a}, {s}"), (15, "{p}, {s}"), (15, "{s} of {a}"), (10, "{a}, black {s}"))
_BACKGROUND_TEMPLATES = (
    (20, "{a}, {f} {s} on {b_a} background"),
    (20, "{fp_a} on {b_a} background, {s}"),
    (20, "{f} {s} of {a} on {b_a} background"),
    (15, "{f} {p}, {s}, {b} background"),
    (10, "{b} background with {f_a} {s} of {a}"),
    (10, "{a}, {s}, {f} on {b}"),
    (5, "{a}: {f} on {b}, {s}"),
)
RELATIONS = {
    "left": "{0} to the left of {1}",
    "right": "{0} to the right of {1}",
    "above": "{0} above {1}",
    "below": "{0} below {1}",
}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def _pick(templates: tuple[tuple[int, str], ...], rng: random.Random) -> str:
    return rng.choices([text for _, text in templates], [weight for weight, _ in templates])[0]


def with_an(words: str) -> str:
    """`words` with the indefinite article that their sound asks for."""
    return ("an " if _VOWEL.match(words) else "a ") + words


def with_article(phrase: str) -> str:
    """The noun phrase as English says it: "a cat", "an owl", "scissors", "the flag of Peru"."""
    words = phrase.split()
    if not words or words[0] in _STARTS:
        return phrase
    if words[0] == "flag" and words[1:2] == ["of"]:
        return f"the {phrase}"
    noun = re.split(r" (with|in|on|of|and|taking|playing|holding|pointing|for) ", phrase.split(",")[0])[0].split()[-1]
    if noun in _UNCOUNTABLE or (_PLURAL.search(noun) and noun not in _SINGULAR):
        return phrase
    return with_an(phrase)


def plural(phrase: str) -> str:
    """The noun phrase in the plural: "red cat" -> "red cats"."""
    *before, noun = phrase.split()
    if not _PLURAL.search(noun):
        if re.search(r"(s|x|z|ch|sh)$", noun):
            noun += "es"
        elif re.search(r"[^aeiou]y$", noun):
            noun = noun[:-1] + "ies"
        else:
            noun += "s"
    return " ".join([*before, noun])


def style_name(style: str) -> str:
    """A style as captions say it, e.g. "solid" -> "solid icon"."""
    if style in _STYLE_PHRASES:
        return _STYLE_PHRASES[style]
    return style if style.endswith(_COMPLETE_STYLES) else f"{style} icon"


def phrase_of(row: Row) -> str:
    """What the icon shows: a noun phrase without article.

    A one-colour emoji loses the colours of its name, for it is drawn in others.
    """
    phrase: str = row["phrase"]
    phrase = re.sub(r": (\w+ hair|beard)$", r" with \1", phrase)
    phrase = re.sub(r"^(\w+): bald$", r"bald \1", phrase)
    phrase = re.sub(r": facing right$", " facing right", phrase)
    phrase = re.sub(r"^(family|kiss|couple with heart): ", r"\1, ", phrase)
    if not row["palette"] and row["hex"]:
        phrase = _COLOUR_WORD.sub("", phrase)
    return phrase


def _said_style(row: Row, rng: random.Random) -> str:
    others = _OTHER_STYLE_NAMES.get(row["style"])
    return rng.choice(others) if others and rng.random() < 0.12 else style_name(row["style"])


def bare(phrase: str) -> str:
    """The phrase without the colour that it names: "red apple" -> "apple"."""
    return _COLOUR_WORD.sub("", phrase)


def _names(row: Row, rng: random.Random) -> tuple[str, str]:
    """(phrase, phrase with article), everyday or official, the skin tone added."""
    phrase = phrase_of(row)
    names = everyday_names(row["phrase"], row["concept"])
    if names and rng.random() < EVERYDAY_SHARE:
        phrase = rng.choice(names) if row["palette"] else bare(rng.choice(names))
    tone = f", {TONES[row['tone']]}" if row["tone"] else ""
    return phrase + tone, with_article(phrase) + tone


def caption_colour(row: Row, background: str, tint: str | None, rng: random.Random) -> str:
    """The caption of an icon in its own colours, or turned to `tint`, on a background of a named colour.

    A row with a true `default_look` goes without a style most of the time.
    """
    p, a = _names(row, rng)
    if tint is not None:
        p = f"{tint} {bare(p)}"
        a = with_article(p)
    s = _said_style(row, rng)
    plain = row.get("default_look") and rng.random() < PLAIN_SHARE
    text = _pick(_PLAIN_TEMPLATES if plain else _STYLED_TEMPLATES, rng).format(p=p, a=a, s=s, s_a=with_an(s))
    return text if background == "white" else f"{text}, on {with_an(background)} background"


def caption_mono(row: Row, foreground: str, background: str, rng: random.Random) -> str:
    """The caption of a one-colour icon drawn in `foreground` on `background`."""
    p, a = _names(row, rng)
    fp_a = with_article(f"{foreground} {p}")
    if background == "white":
        if p in SHAPES and rng.random() < 0.5:
            return fp_a
        templates = _BLACK_TEMPLATES if foreground == "black" and rng.random() < 0.6 else _WHITE_TEMPLATES
    else:
        templates = _BACKGROUND_TEMPLATES
    s = _said_style(row, rng)
    words = {"p": p, "a": a, "s": s, "f": foreground, "b": background, "fp_a": fp_a}
    return _pick(templates, rng).format(**words, f_a=with_an(foreground), b_a=with_an(background))


def on_background(text: str, background: str, rng: random.Random) -> str:
    """The caption of a composition with its background, which is left unsaid now and then when it is white."""
    if background == "white" and rng.random() < 0.7:
        return text
    return f"{text}, {with_an(background)} background"
