"""What a picture's file says of its cost, read from its bytes before any decoder sees it.

A small file can keep a decoder busy for minutes: thousands of scans over one JPEG, millions of empty chunks.
"""

from __future__ import annotations

import re
import struct

__all__ = ["CostlyImageError", "check_cost"]

MOST_SCANS = 64  # of a JPEG; a progressive one has some ten
MOST_PARTS = 1024  # segments or chunks beside those that hold the pixels
MOST_PIXEL_PARTS = 16_384  # an encoder that writes 12 MB in chunks of a kilobyte stays below
MOST_METADATA = 4 * 2**20  # bytes; colour profiles take up to two megabytes
PNG, JPEG, RIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF"
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # FF00 is a pixel's byte, FFD0 to FFD7 are restarts
_SCAN, _END = 0xDA, 0xD9


class CostlyImageError(Exception):
    """A file whose decoding would cost more than any ordinary picture's."""


def check_cost(data: bytes) -> None:
    """Raise CostlyImageError for a PNG, JPEG or WebP of too many parts. Damage is left for the decoder to find."""
    if data.startswith(PNG):
        _check_chunks(data, len(PNG), ">I4s", extra=12, pixels=(b"IDAT", b"fdAT"), padded=False)
    elif data.startswith(RIFF):
        _check_chunks(data, 12, "<4sI", extra=8, pixels=(b"VP8 ", b"VP8L", b"ALPH", b"ANMF"), padded=True)
    elif data.startswith(JPEG):
        _check_segments(data)


class _Count:
    """The parts of one file so far."""

    def __init__(self) -> None:
        self._parts = self._pixel_parts = self._metadata = 0

    def add(self, size: int, *, holds_pixels: bool) -> None:
        if holds_pixels:
            self._pixel_parts += 1
        else:
            self._parts += 1
            self._metadata += size
        if self._parts > MOST_PARTS or self._pixel_parts > MOST_PIXEL_PARTS or self._metadata > MOST_METADATA:
            raise CostlyImageError


def _check_chunks(data: bytes, start: int, head: str, *, extra: int, pixels: tuple[bytes, ...], padded: bool) -> None:
    count = _Count()
    while start + 8 <= len(data):
        first, second = struct.unpack_from(head, data, start)
        size, name = (first, second) if isinstance(first, int) else (second, first)
        count.add(size, holds_pixels=name in pixels)
        if name == b"IEND":
            return
        start += extra + size + (size & 1 if padded else 0)


def _check_segments(data: bytes) -> None:
    count, scans, start = _Count(), 0, len(JPEG)
    while (found := _MARKER.search(data, start)) is not None:
        marker = found[1][0]
        if marker == _END:
            return
        size = int.from_bytes(data[found.end() : found.end() + 2], "big")
        start = found.end() + max(size, 2)
        count.add(size, holds_pixels=marker == _SCAN)
        scans += marker == _SCAN
        if scans > MOST_SCANS:
            raise CostlyImageError
