"""Graphs that share the weights of a model's safetensors files: OpenVINO's form without a second copy of them.

OpenVINO stores a network as an `.xml` graph whose constants point, by offset and size, into one file of raw bytes. A
safetensors file is a header and then raw bytes too, and the network's weights are the same ones. So the graphs here,
gzipped to a twentieth, point into a space that is never stored as one file:

    [ the component's safetensors file | zeros up to a multiple of 64 | part.bin, the few constants not found in it ]

`openvino/index.json` says, for each of PARTS, which safetensors file that is, with its size and SHA-256, because the
offsets and the constants in `part.bin` hold for no other file. `onestill.export.shared_weights` writes all of it.

`openvino/int8.json` names, for each network that int8 draws well enough, the layers that compute in it, each with the
measured range [low, high] of its input, or null. They are made from the float16 weights when a network is first
compiled (`onestill.engine.openvino.int8.quantize`); no copy is stored.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo, read_json, sha256
from onestill.engine.openvino.cpu import fastest_float, multiplies_int8
from onestill.engine.openvino.int8 import DYNAMIC, Layers, quantize
from onestill.engine.openvino.network import Graph, static_shapes
from onestill.engine.openvino.private_api import UNCHAINED, can_unchain
from onestill.errors import CheckpointError

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
INT8 = "int8.json"
INT8_FORMAT = 1
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
EXACT: Mapping[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}


@dataclass(frozen=True)
class SharedGraph(Graph):
    """One part of a model; `path` is its gzipped `.xml`.

    Attributes:
        rest: the `.bin` with what is not among the weights.
        weights: the component's safetensors file.
        weights_bytes: the size that file must have.
        weights_sha256: the hash that file must have.
        layers: those that compute in int8.
    """

    rest: Path
    weights: Path
    weights_bytes: int
    weights_sha256: str
    layers: Layers = field(default_factory=dict)

    def fingerprint(self) -> str:
        """What changes when any of the files does, as far as `onestill.checkpoint.verify` has not seen to it."""
        try:
            content = self.path.read_bytes() + self.rest.read_bytes()
            size = self.weights.stat().st_size
        except OSError as error:
            raise CheckpointError(f"'{error.filename}' cannot be read; copy the whole model again.") from error
        return f"{hashlib.sha256(content).hexdigest()} {self.weights_sha256} {size} {sorted(self.layers.items())}"

    def content(self) -> tuple[bytes, NDArray[np.uint8]]:
        """The graph's text and the bytes that its offsets point into.

        Raises:
            CheckpointError: a file is missing, or the weights are not those that the graph was made from.
        """
        try:
            graph, rest = gzip.decompress(self.path.read_bytes()), self.rest.read_bytes()
            start = aligned(self.weights_bytes)
            space = np.zeros(start + len(rest), dtype=np.uint8)
            with self.weights.open("rb") as file:
                found = file.readinto(space[: self.weights_bytes].data) + len(file.read(1))
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise CheckpointError(f"'{self.path}' is damaged; copy the whole model again.") from error
        except OSError as error:
            raise CheckpointError(f"'{error.filename}' cannot be read; copy the whole model again.") from error
        if found != self.weights_bytes or sha256(self.weights) != self.weights_sha256:
            raise CheckpointError(
                f"'{self.weights}' is not the file that '{self.path}' was made from; load the model with the engine "
                "'torch', or export its OpenVINO form again."
            )
        space[start:] = np.frombuffer(rest, dtype=np.uint8)
        return graph, space

    def read(self, core: Any, shape: tuple[int, ...]) -> tuple[Any, NDArray[np.uint8]]:
        """The network for a first input of `shape`, and the memory that its constants point into."""
        graph, space = self.content()
        model = core.read_model(graph, openvino.Tensor(space, shared_memory=True))
        model.reshape(static_shapes(model, shape))
        quantize(model, self.layers)
        return model, space


def read_index(folder: Path) -> dict[str, SharedGraph]:
    """Every part of the model in `folder`, as it is in float.

    Raises:
        CheckpointError: there is no index, it is of another format, or it does not name every part.
    """
    index = read_json(folder, f"{FOLDER}/index.json")
    if index.get("format") != FORMAT:
        raise CheckpointError(f"'{folder}' has an OpenVINO form of another version; update onestill, or export again.")
    try:
        return {
            part: SharedGraph(
                name=part,
                path=folder / FOLDER / f"{part}.xml.gz",
                options={},
                rest=folder / FOLDER / f"{part}.bin",
                weights=folder / component / Path(str(index["parts"][part]["weights"])).name,
                weights_bytes=int(index["parts"][part]["size"]),
                weights_sha256=str(index["parts"][part]["sha256"]),
            )
            for part, component in PARTS.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{folder}/{FOLDER}/index.json' is damaged; copy the model again.") from error


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


# --- int8 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8:
    """How a model computes in int8, and how near to float32 that draws.

    Attributes:
        parts: the layers of each network that has any.
        psnr_db: of the pictures with all of these networks against float32's: "mean" and "worst", over `pictures`.
        pictures: how many that was measured on.
    """

    parts: Mapping[str, Layers] = field(default_factory=dict)
    psnr_db: Mapping[str, float] = field(default_factory=dict)
    pictures: int = 0


def has_int8(folder: Path) -> bool:
    """Whether the model in `folder` was ever measured in int8."""
    return (folder / FOLDER / INT8).is_file()


def read_int8(folder: Path) -> Int8 | None:
    """What the model in `folder` computes in int8, or None where it has no such form.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not has_int8(folder):
        return None
    found = read_json(folder, f"{FOLDER}/{INT8}")
    try:
        if found["format"] != INT8_FORMAT:
            raise CheckpointError(f"'{folder}' has an int8 form of another version; update onestill, or export again.")
        parts = {
            part: {str(name): None if at is None else (float(at[0]), float(at[1])) for name, at in one.items()}
            for part, one in found["parts"].items()
            if part in PARTS
        }
        return Int8(parts, {name: float(value) for name, value in found["psnr_db"].items()}, int(found["pictures"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"'{folder}/{FOLDER}/{INT8}' is damaged; copy the model again.") from error


# --- the source of an engine's networks -----------------------------------------------------------------------------


class SharedWeights:
    """A model's networks in this form.

    Args:
        info: the model; its folder must have the form.
        quick_start: see `onestill.engine.openvino.engine.OpenVinoEngine`.

    Raises:
        CheckpointError: the form is incomplete or of another version.
    """

    is_large = False

    def __init__(self, info: ModelInfo, *, quick_start: bool = False) -> None:
        int8 = read_int8(info.path)
        self._int8: Mapping[str, Layers] = int8.parts if int8 is not None else {}
        self._graphs = read_index(info.path)
        self._quick_start = quick_start
        self.has_int8 = bool(self._int8)
        self.decoder_scale = info.scaling_factor

    def fastest_dtype(self, core: Any) -> str:
        """What the CPU computes this model fastest in: int8 where its quality in that was measured and found good."""
        fastest = fastest_float(core)
        return "int8" if self.has_int8 and multiplies_int8(fastest == "bfloat16") else fastest

    def graphs(self, core: Any, dtype: str) -> Iterator[SharedGraph]:
        """Every network, to be computed in `dtype`."""
        int8 = self._int8 if dtype == "int8" else {}
        # Beside int8 the other networks are in the fastest float type; float layers of int8 networks are exact.
        precision = PRECISIONS[fastest_float(core) if dtype == "int8" else dtype]
        # A text encoder without kernels for chains of operations is as fast, and its output is the same. A UNet is
        # slower; int8 layers of given ranges come out wrong (26 dB).
        unchained = ["text_encoder", *(["unet"] if self._quick_start else [])] if can_unchain(core) else []
        for part, graph in self._graphs.items():
            layers = int8.get(part, {})
            options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
            if part == "time" or layers:
                options |= EXACT
            if part in unchained and not any(layers.values()):
                options |= UNCHAINED
            if None in layers.values():
                options |= DYNAMIC
            yield replace(graph, options=options, layers=layers)
