"""OpenVINO's form of a model, kept without a second copy of the weights.

OpenVINO stores a network as an `.xml` graph whose constants point, by offset and size, into one file of raw bytes. A
safetensors file is a header and then raw bytes too, and the network's weights are the same ones. So the graphs here,
gzipped to a twentieth, point into a space that is never stored as one file:

    [ the component's safetensors file | zeros up to a multiple of 64 | part.bin, the few constants not found in it ]

`openvino/index.json` says, for each of PARTS, which safetensors file that is, with its size and SHA-256, because the
offsets and the constants in `part.bin` hold for no other file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import read_json, sha256
from onestill.errors import CheckpointError

__all__ = ["FOLDER", "PARTS", "PartFiles", "point_into_weights", "read_index"]

FOLDER = "openvino"
# `time` is the UNet's embedding of the timestep. It is a graph of its own because it must stay in float32 (to bfloat16,
# timestep 999 is 1000), and because the other pictures at the same timestep need not compute it again.
PARTS: Mapping[str, str] = {
    "text_encoder": "text_encoder",
    "time": "unet",
    "unet": "unet",
    "decoder": "vae",
    "encoder": "vae",
}
FORMAT = 2
ALIGNMENT = 64
SMALLEST = 64  # bytes; below it equal bytes mean little, and a copy costs nothing
# Where a node came from, by names that OpenVINO counts up over a process: nobody reads them, and no two runs agree.
ORIGINS = re.compile(r'\s*<attribute name="fused_names"[^>]*/>')
EMPTY_INFO = re.compile(r"\s*<rt_info>\s*</rt_info>")
CONSTANT = re.compile(r'(<data element_type="[^"]*" shape="[^"]*" offset=")(\d+)(" size=")(\d+)(")')


@dataclass(frozen=True)
class PartFiles:
    """Where one part of a model lies.

    Attributes:
        graph: the gzipped `.xml`.
        rest: the `.bin` with what is not among the weights.
        weights: the component's safetensors file.
        weights_bytes: the size that file must have.
        weights_sha256: the hash that file must have.
    """

    graph: Path
    rest: Path
    weights: Path
    weights_bytes: int
    weights_sha256: str

    def fingerprint(self) -> str:
        """What changes when any of the files does, as far as `onestill.checkpoint.verify` has not seen to it.

        Raises:
            CheckpointError: a file is missing.
        """
        try:
            content = self.graph.read_bytes() + self.rest.read_bytes()
            size = self.weights.stat().st_size
        except OSError as error:
            raise CheckpointError(f"'{error.filename}' cannot be read; copy the whole model again.") from error
        return f"{hashlib.sha256(content).hexdigest()} {self.weights_sha256} {size}"

    def read(self) -> tuple[bytes, NDArray[np.uint8]]:
        """The graph's text and the bytes that its offsets point into.

        Raises:
            CheckpointError: a file is missing, or the weights are not those that the graph was made from.
        """
        try:
            graph, rest = gzip.decompress(self.graph.read_bytes()), self.rest.read_bytes()
            start = _aligned(self.weights_bytes)
            space = np.zeros(start + len(rest), dtype=np.uint8)
            with self.weights.open("rb") as file:
                found = file.readinto(space[: self.weights_bytes].data) + len(file.read(1))
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise CheckpointError(f"'{self.graph}' is damaged; copy the whole model again.") from error
        except OSError as error:
            raise CheckpointError(f"'{error.filename}' cannot be read; copy the whole model again.") from error
        if found != self.weights_bytes or sha256(self.weights) != self.weights_sha256:
            raise CheckpointError(
                f"'{self.weights}' is not the file that '{self.graph}' was made from; load the model with the engine "
                "'torch', or export its OpenVINO form again."
            )
        space[start:] = np.frombuffer(rest, dtype=np.uint8)
        return graph, space


def read_index(folder: Path) -> dict[str, PartFiles]:
    """Every part of the model in `folder` -> its files. See `onestill.export.folder` for the writer.

    Raises:
        CheckpointError: there is no index, it is of another format, or it does not name every part.
    """
    index = read_json(folder, f"{FOLDER}/index.json")
    if index.get("format") != FORMAT:
        raise CheckpointError(f"'{folder}' has an OpenVINO form of another version; update onestill, or export again.")
    try:
        return {
            part: PartFiles(
                graph=folder / FOLDER / f"{part}.xml.gz",
                rest=folder / FOLDER / f"{part}.bin",
                weights=folder / component / Path(str(index["parts"][part]["weights"])).name,
                weights_bytes=int(index["parts"][part]["size"]),
                weights_sha256=str(index["parts"][part]["sha256"]),
            )
            for part, component in PARTS.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{folder}/{FOLDER}/index.json' is damaged; copy the model again.") from error


def write_index(folder: Path, parts: Mapping[str, Path], openvino_version: str) -> None:
    """Write `index.json` into `folder`, which holds the parts' graphs; `parts` names each one's weights."""
    found = {
        part: {"weights": f"{PARTS[part]}/{path.name}", "size": path.stat().st_size, "sha256": sha256(path)}
        for part, path in parts.items()
    }
    index = {"format": FORMAT, "openvino": openvino_version, "parts": found}
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n")


def point_into_weights(graph: str, constants: bytes, weights: Path) -> tuple[str, bytes]:
    """Turn a graph that points into `constants` into one that points into the space of `PartFiles`.

    Args:
        graph: the `.xml` that OpenVINO wrote.
        constants: the `.bin` beside it.
        weights: a safetensors file that holds most of the same constants, byte for byte.

    Returns:
        The changed graph, and the constants that are not in `weights`.
    """
    places = _tensor_places(weights)
    start = _aligned(weights.stat().st_size)
    rest = bytearray()
    moved: dict[bytes, int] = {}

    def move(match: re.Match[str]) -> str:
        offset, size = int(match[2]), int(match[4])
        value = constants[offset : offset + size]
        place = places.get(value) if size >= SMALLEST else None
        if place is None and value not in moved:
            rest.extend(bytes(_aligned(len(rest)) - len(rest)))
            moved[value] = start + len(rest)
            rest.extend(value)
        return f"{match[1]}{moved[value] if place is None else place}{match[3]}{size}{match[5]}"

    graph = EMPTY_INFO.sub("", ORIGINS.sub("", graph))
    return CONSTANT.sub(move, graph), bytes(rest)


def _tensor_places(weights: Path) -> dict[bytes, int]:
    """The bytes of every tensor in a safetensors file -> where in the file they start."""
    data = weights.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:length])
    spans = [(length + begin, length + end) for begin, end in _offsets(header)]
    return {data[begin:end]: begin for begin, end in spans}


def _offsets(header: Mapping[str, Mapping[str, list[int]]]) -> list[tuple[int, int]]:
    return [(at["data_offsets"][0], at["data_offsets"][1]) for at in header.values() if "data_offsets" in at]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
