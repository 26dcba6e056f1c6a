"""Where the samples of a tar shard lie, found in one pass over its headers; damage costs only the samples it hit."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
KEY_BYTES = 88  # with ".latents.npy" behind it, the 100 bytes that a tar header has for a name
GZIP = b"\x1f\x8b"
_BLOCK = 512
_ZEROS = bytes(_BLOCK)


@dataclass
class Entry:
    """One sample of a shard: suffix -> (offset, size) in bytes of each of its files.

    `unclear` says why nobody can tell which picture belongs to which caption, "" where it is clear.
    """

    key: str
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    unclear: str = ""

    @property
    def images(self) -> list[str]:
        """The suffixes of its pictures."""
        return [suffix for suffix in IMAGE_SUFFIXES if suffix in self.files]


@dataclass
class TarIndex:
    """The samples of one shard in the order of the file, and what could not be read: (what, why)."""

    path: Path
    entries: list[Entry]
    damage: list[tuple[str, str]]


def plain_key(name: str, most_bytes: int = KEY_BYTES) -> str:
    """`name` as a shard's key: slashes and dots as hyphens, and at most so many bytes of UTF-8, no letter cut."""
    key = name.removeprefix("./").replace("/", "-").replace(".", "-")
    return key.encode()[:most_bytes].decode(errors="ignore")


def _checksum(header: bytes) -> int:
    # The checksum counts its own eight bytes as spaces.
    return sum(header) - sum(header[148:156]) + 8 * 32


def _octal(field_bytes: bytes) -> int | None:
    if field_bytes[:1] == b"\x80":
        return int.from_bytes(field_bytes[1:], "big")
    digits = field_bytes.rstrip(b"\0 ").lstrip(b" ")
    if not digits:
        return 0
    # `int` would read a sign, or an underline, as well.
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def _is_header(block: bytes) -> bool:
    return _octal(block[148:156]) == _checksum(block) and _octal(block[124:136]) is not None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    prefix = header[345:500].split(b"\0", 1)[0].decode("utf-8", "replace") if header[257:262] == b"ustar" else ""
    # GNU's format keeps times where POSIX keeps the prefix.
    return f"{prefix}/{name}" if prefix and header[257:265] == b"ustar\x0000" else name


def _pax_name(record: bytes) -> str | None:
    """The `path` of a POSIX extended header, whose records are lines of "LENGTH KEY=VALUE"."""
    while record:
        digits, _, _ = record.partition(b" ")
        if not digits.isdigit() or int(digits) <= len(digits):
            return None
        key, _, value = record[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "replace")
        record = record[int(digits) :]
    return None


def _members(data: mmap.mmap, damage: list[tuple[str, str]]) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file in a tar; behind a bad header the next good one is looked for."""
    position, end, long_name, lost = 0, len(data), None, False
    while position + _BLOCK <= end:
        header = data[position : position + _BLOCK]
        if header == _ZEROS or not _is_header(header):
            if header != _ZEROS and not lost:
                damage.append((f"byte {position}", "no tar header where one should be"))
                lost = True
            position += _BLOCK
            continue
        lost = False
        size = _octal(header[124:136]) or 0
        start = position + _BLOCK
        name, long_name = long_name or _name(header), None
        position = start + -(-size // _BLOCK) * _BLOCK
        if start + size > end:
            damage.append((name, "the shard ends in the middle of it"))
            return
        kind = header[156:157]
        if kind == b"L":
            long_name = data[start : start + size].rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            long_name = _pax_name(data[start : start + size])
        elif kind in (b"0", b"\0"):
            yield name, start, size
    if position > end or end % _BLOCK:
        damage.append((f"byte {end}", "the shard is cut off"))


def read_index(path: Path) -> TarIndex:
    """Index one shard. Raises OSError if the file cannot be opened; damage inside it is only reported."""
    damage: list[tuple[str, str]] = []
    entries: list[Entry] = []
    by_key: dict[str, list[Entry]] = {}
    if os.path.getsize(path) == 0:
        return TarIndex(path, [], [("byte 0", "the shard is empty")])
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:2] == GZIP:
            return TarIndex(path, [], [("byte 0", "the shard is compressed: unpack it with gunzip")])
        for name, offset, size in _members(data, damage):
            folder, _, base = name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not dot or not stem:
                continue
            key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
            of_key = by_key.setdefault(key, [])
            if not of_key or suffix in of_key[-1].files:
                of_key.append(Entry(key))
                entries.append(of_key[-1])
            of_key[-1].files[suffix] = (offset, size)
    # One sample after the other, each with the same files, is what a careless writer leaves. Anything else might give a
    # picture another's caption.
    unclear = {
        key for key, of_key in by_key.items() if any(one.files.keys() != of_key[0].files.keys() for one in of_key)
    }
    for key in unclear:
        by_key[key][0].unclear = f"its key is there {len(by_key[key])} times, with other files"
    return TarIndex(path, [one for one in entries if one.key not in unclear or one.unclear], damage)
