"""Pictures to upload: good ones, and those that must be refused."""

from __future__ import annotations

import io
import struct
import zlib

import PIL.ExifTags
import PIL.Image


def png(size: tuple[int, int] = (40, 20), colour: str = "red") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a kilobyte that claims 30000 x 30000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 500_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("P", (8, 8)).save(file, "GIF")
    return file.getvalue()


def scan_bomb(size: int = 4000, scans: int = 1000) -> bytes:
    """A grey progressive JPEG of 62 KB that goes over all its pixels, and says nothing of them, in each scan."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    head = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, size, size, 1) + b"\1\x11\0")
    tables = segment(0xC4, b"\0\1" + bytes(15) + b"\0") + segment(0xC4, b"\x10\1\1" + bytes(14) + b"\xe0\0")
    blocks = (-(-size // 8)) ** 2
    first = segment(0xDA, b"\1\1\0\0\0\0") + bytes(-(-blocks // 8))
    bits, left = "", blocks
    while left > 0:  # runs of up to 2**15 - 1 blocks without a coefficient
        run = min(left, 2**15 - 1)
        bits += "0" + format(max(run, 2**14) - 2**14, "014b")
        left -= max(run, 2**14)
    bits += "1" * (-len(bits) % 8)
    run_bytes = b"".join(
        bytes([value, 0] if value == 255 else [value])
        for value in (int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    )
    return (
        b"\xff\xd8" + head + tables + first + (segment(0xDA, b"\1\1\x10\1\x3f\x10") + run_bytes) * scans + b"\xff\xd9"
    )


def slow_jpeg() -> bytes:
    """A JPEG that passes every check and takes seconds."""
    return scan_bomb(scans=60)
