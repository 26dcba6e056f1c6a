"""BERT's preparation of text: cleaned, lower-cased words without accents, and punctuation marks as words.

Equal to `BertNormalizer` and `BertPreTokenizer` of the `tokenizers` library, character by character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable


def _ranges(text: str) -> tuple[range, ...]:
    ends = ([int(end, 16) for end in pair.split("-")] for pair in text.split())
    return tuple(range(first, last + 1) for first, last in ends)


# The library knows the marks and punctuation of Unicode 8, whichever Unicode Python knows. What came later, or became
# a mark later, is a letter to it; these ranges (ends included) hold all of that, and no mark or punctuation of its own.
_LETTERS = _ranges("""
    5C8-5C9 61D-61D 7FD-7FD 890-8E2 9FD-9FE A76-A76 AFA-AFF B53-B55 C04-C3C C77-C77 C84-C84 D00-D00 D3B-D3C D81-D81
    EBA-EBA ECE-ECE 180F-1886 1ABF-1AF0 1B4E-1B4F 1B7D-1B7F 1DF6-1DFB 2E43-2E63 A82C-A82C A8C5-A8C5 A8FF-A8FF A9BD-A9BD
    10D24-10F89 11070-11074 110C2-110CD 111CF-111CF 1123E-11241 1133B-1133B 113BB-1145E 11660-1166C 116B9-116B9
    1182F-11FFF 12FF1-1612F 16D6D-16F4F 16FE2-16FE4 1CF00-1D128 1D25B-1D25C 1E000-1E6F5 1E944-1E95F
""")
_CHANGED = {"\u166d": "Po", "\u1734": "Mn", "\U000111c9": "Po", "\U0001171e": "Mn"}  # their categories in Unicode 8
_IDEOGRAPHS = _ranges("3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2B81F 2B920-2CEAF 2F800-2FA1F")  # its own list


class BertNormalizer:
    """Text -> the words and punctuation marks that WordPiece then splits. Safe to call from many threads.

    Args:
        lowercase: turn capitals into small letters.
        strip_accents: remove accents.
        space_ideographs: make each Chinese character a word by itself.
    """

    def __init__(self, *, lowercase: bool = True, strip_accents: bool = True, space_ideographs: bool = True) -> None:
        self._lowercase, self._strip_accents, self._space_ideographs = lowercase, strip_accents, space_ideographs
        self._cleaned, self._separated = _Translation(self._clean), _Translation(self._separate)

    def __call__(self, text: str) -> list[str]:
        """The words of a text of any length."""
        text = text.translate(self._cleaned)
        if self._strip_accents:
            text = unicodedata.normalize("NFD", text)
        return text.translate(self._separated).split()

    def _clean(self, character: str) -> str:
        if character in "\t\n\r":
            return " "
        if character == "\ufffd" or _category(character)[0] == "C":
            return ""
        if self._space_ideographs and any(ord(character) in one for one in _IDEOGRAPHS):
            return f" {character} "
        return character

    def _separate(self, character: str) -> str:
        category = _category(character)
        if category == "Mn" and self._strip_accents:
            return ""
        if category[0] == "P" or character in "$+<=>^`|~":
            return f" {character} "
        return character.lower() if self._lowercase else character


class _Translation(dict[int, str]):
    """What `str.translate` puts for each character, worked out when it is first met."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        self._rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = made = self._rule(chr(code))
        return made


def _category(character: str) -> str:
    """The Unicode category that the library gives a character; unassigned ones are letters to it."""
    if character in _CHANGED:
        return _CHANGED[character]
    category = unicodedata.category(character)
    return "Lo" if category == "Cn" or any(ord(character) in one for one in _LETTERS) else category
