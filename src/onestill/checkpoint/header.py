"""What a safetensors file says of itself before its weights: each tensor's name, type and shape, and its notes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onestill.errors import CheckpointError, UnsafeFormatError

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
MAX_HEADER_BYTES = 64 * 2**20  # SDXL's has half a megabyte
BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
        "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
        "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}  # fmt: skip


class Tensor(NamedTuple):
    """One tensor of a file: its type as safetensors writes it ("F16", "BF16", ...), its shape, and its first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0


class Header(NamedTuple):
    """The start of a file.

    Attributes:
        tensors: name -> type and shape.
        notes: free-form text that the file's maker wrote, such as `modelspec.resolution`.
        end: bytes the file must have.
    """

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, str]
    end: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file: 8 bytes of its length, then JSON. The weights are not read.

    Raises:
        UnsafeFormatError: it is a pickle, whatever its name.
        CheckpointError: it is no safetensors file, or is truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        if is_pickle(path, start):
            raise pickle_error(path)
        file.seek(8)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else size
        try:
            if length > min(size, MAX_HEADER_BYTES):
                raise ValueError("header longer than the file")
            entries = json.loads(file.read(length), object_pairs_hook=_once, parse_constant=_no_number)
            notes = entries.pop("__metadata__", None) or {}
            _check(notes, entries)
            tensors = {
                name: Tensor(at["dtype"], tuple(at["shape"]), 8 + length + int(at["data_offsets"][0]))
                for name, at in entries.items()
            }
            end = 8 + length + max((int(at["data_offsets"][1]) for at in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"'{path}' is no safetensors file, or is damaged; copy the model again.") from error
    if size < end:
        raise CheckpointError(f"'{path}' is truncated: it has {size} of {end} bytes; copy the model again.")
    if size > end:  # which safetensors refuses too
        raise CheckpointError(f"'{path}' is not the file that the model was published with; copy the model again.")
    return Header(tensors, {str(name): str(value) for name, value in notes.items()}, end)


def _check(notes: Any, entries: Mapping[str, Any]) -> None:
    """Raise ValueError for what safetensors itself refuses: tensors that overlap, leave gaps, or are no tensors."""
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise ValueError("notes")
    " ".join((*entries, *notes, *notes.values())).encode()  # half a surrogate pair is no text
    filled = 0
    for start, end, kind, shape in sorted((*at["data_offsets"], at["dtype"], at["shape"]) for at in entries.values()):
        if any(type(number) is not int or not 0 <= number < 2**63 for number in (start, end, *shape)):
            raise ValueError("numbers")
        if start != filled or kind not in BITS or (end - start) * 8 != prod(shape) * BITS[kind]:
            raise ValueError("places")
        filled = end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity, which are not JSON


def read_numbers(path: Path, name: str) -> NDArray[np.float32]:
    """One small tensor of a file, flat, without torch.

    Raises:
        CheckpointError: it is of a type that nobody stores such numbers in.
    """
    tensor = read_header(path).tensors[name]
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    if tensor.dtype not in types:
        raise CheckpointError(f"'{name}' in '{path}' is of type {tensor.dtype}; save it as float32.")
    kind = np.dtype(types[tensor.dtype])
    with path.open("rb") as file:
        file.seek(tensor.start)
        values = np.frombuffer(file.read(prod(tensor.shape) * kind.itemsize), kind)
    if tensor.dtype == "BF16":  # the upper half of a float32
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float32)


def check_safetensors(path: Path) -> None:
    """Compare a file's length with its header.

    Raises:
        CheckpointError: it is damaged, truncated, or has something behind its tensors.
    """
    read_header(path)


def is_pickle(path: Path, start: bytes) -> bool:
    """Whether a file is a pickle by its name or its first 9 bytes.

    Protocol 2 and later start with 0x80, torch's form is a zip. A header's length may start with 0x80 too, but the
    header itself, from byte 8, is a JSON object.
    """
    looks_so = start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:9] != b"{")
    return path.suffix in PICKLE_SUFFIXES or looks_so


def pickle_error(path: Path) -> UnsafeFormatError:
    """The error for a file that is never opened."""
    return UnsafeFormatError(
        f"'{path}' is a pickle, which can run code when it is read; save the model again with safe_serialization=True."
    )
