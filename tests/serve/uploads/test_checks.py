from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
import pytest

from onestill.serve.uploads.checks import CostlyImageError, check_cost
from onestill.serve.uploads.worker import DONE, TOO_COSTLY, decoded
from tests.serve.pictures import png, scan_bomb


def noise(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunks(more: bytes) -> bytes:
    return png()[:33] + more + png()[33:]


def with_segments(more: bytes) -> bytes:
    return noise("JPEG")[:2] + more + noise("JPEG")[2:]


def with_riff(more: bytes) -> bytes:
    whole = noise("WEBP", lossless=True) + more
    return whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:]


@pytest.mark.parametrize(
    "data",
    [
        png(),
        noise("PNG"),
        noise("JPEG", progressive=True, quality=95, icc_profile=b"p" * 2**21, comment=b"a" * 60_000),
        noise("JPEG", progressive=True, restart_marker_blocks=1),
        noise("WEBP", icc_profile=b"p" * 3001),
        noise("JPEG") + b"\xff\xda" * 1000,  # what follows the end, as a telephone appends a film
        with_chunks(chunk(b"tEXt", b"a\0b") * 500),
    ],
)
def test_an_ordinary_picture_passes(data: bytes) -> None:
    check_cost(data)
    assert decoded(data, 8, 8, 10**6)[0] == DONE


@pytest.mark.parametrize(
    "data",
    [
        scan_bomb(scans=100),
        with_segments(b"\xff\xfe\x00\x02" * 2000),
        with_segments(b"\xff\xe5\xff\xff" + bytes(65533) + (b"\xff\xe5\xff\xff" + bytes(65533)) * 70),
        with_segments(b"\xff" * 50 + b"\xfe\x00\x02" + b"\xff\xfe\x00\x00" * 2000),  # fill bytes, impossible lengths
        with_chunks(chunk(b"tEXt") * 2000),
        with_chunks(chunk(b"iCCP", bytes(5 * 2**20))),
        with_chunks(chunk(b"IDAT") * 20_000),
        with_riff(b"XMP \0\0\0\0" * 2000),
        with_riff(b"odd " + struct.pack("<I", 5 * 2**20) + bytes(5 * 2**20)),
    ],
)
def test_a_file_of_too_many_parts_is_refused_before_it_is_decoded(data: bytes) -> None:
    with pytest.raises(CostlyImageError):
        check_cost(data)
    assert decoded(data, 8, 8, 10**6)[0] == TOO_COSTLY


def test_damage_ends_the_check() -> None:
    for data in (
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"RIFF",
        png()[:20],
        noise("JPEG")[:700],
        b"\xff\xd8" + b"\xff" * 999,
    ):
        check_cost(data)
