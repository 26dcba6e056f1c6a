"""A model's OpenVINO form that shares its weights with safetensors files, checked against torch. Needs `[torch]`.

`onestill.engine.openvino.shared_weights` says what the form is, and reads it.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino, opset13

import numpy as np

from onestill.checkpoint import ModelInfo, describe, sha256, verify, weights_file
from onestill.engine.openvino.cpu import lacks_vnni
from onestill.engine.openvino.engine import OpenVinoEngine
from onestill.engine.openvino.shared_weights import FOLDER, FORMAT, PARTS, aligned
from onestill.engine.torch.eager import TorchEngine
from onestill.errors import CheckpointError, OnestillError
from onestill.export.calibrate import write_int8
from onestill.export.convert import convert, example_inputs, wrapped
from onestill.export.folder import folder_written_whole
from onestill.networks.load import load_components

BATCH = 2  # of the inputs to trace with: an axis of this size in front becomes the batch
MOST_DIFFERENCE = 2e-3  # of the largest value; both compute in float32 with the same weights
SMALLEST_WEIGHT = 16  # numbers; a shorter constant is no weight
SMALLEST_SHARED = 64  # bytes; below it equal bytes mean little, and a copy costs nothing
# Where a node came from, by names that OpenVINO counts up over a process: nobody reads them, and no two runs agree.
ORIGINS = re.compile(r'\s*<attribute name="fused_names"[^>]*/>')
EMPTY_INFO = re.compile(r"\s*<rt_info>\s*</rt_info>")
CONSTANT = re.compile(r'(<data element_type="[^"]*" shape="[^"]*" offset=")(\d+)(" size=")(\d+)(")')


def export_openvino(folder: Path, *, int8: bool = False) -> Path:
    """Add OpenVINO's form to a model's folder, sharing its weights, and check it against torch.

    What was there before is replaced once the new form draws as torch does. Write the manifest after this.

    Args:
        folder: the model, in diffusers' format.
        int8: also measure which networks draw well in int8; a minute or two. See `onestill.export.calibrate`.

    Returns:
        `folder/openvino`.

    Raises:
        CheckpointError: the folder is no such model, or OpenVINO computes something else than torch.
        OnestillError: int8 cannot be measured on this CPU.
    """
    info = describe(folder)
    verify(folder)
    if int8 and lacks_vnni():
        raise OnestillError("int8 is measured by drawing, and this CPU has no VNNI for that; leave out --int8.")
    components = load_components(info)
    target = folder / FOLDER
    with folder_written_whole(target, force=True) as unfinished:
        weights = {}
        for part, component in PARTS.items():
            weights[part] = weights_file(folder, component)
            module = components[component]
            examples = example_inputs(part, module, info, BATCH, info.latent_shape[1:])
            free_axes = {name: (0,) for name, value in examples.items() if len(value) == BATCH}
            model = convert(wrapped(part, module, info), examples, free_axes)
            _write_graph(model, unfinished / part, weights[part])
        _write_index(unfinished, weights)
    try:
        _check_openvino(info)
        if int8:
            write_int8(info)
    except Exception:
        shutil.rmtree(target)
        raise
    return target


# --- graphs that point into safetensors files -------------------------------------------------------------------------


def _write_graph(model: Any, path: Path, weights: Path) -> None:
    _keep_as_float16(model)
    # OpenVINO counts its names up over a process; named by their places, the same model gives the same file.
    model.set_friendly_name(path.name)
    for i, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}_{i}")
        if node.get_type_name() != "Parameter":  # whose names are the inputs'
            for output in node.outputs():
                output.get_tensor().set_names(set())
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole.xml"
        openvino.serialize(model, str(whole), str(whole.with_suffix(".bin")))
        graph, rest = _point_into_weights(whole.read_text(), whole.with_suffix(".bin").read_bytes(), weights)
    path.with_suffix(".xml.gz").write_bytes(gzip.compress(graph.encode(), mtime=0))
    path.with_suffix(".bin").write_bytes(rest)


def _keep_as_float16(model: Any) -> None:
    """Store the constants that float16 holds exactly in that type, which the weights of such a folder are.

    OpenVINO's own compression rounds everything, and ruins the table of frequencies that timesteps are embedded by.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32:
            continue
        value = node.data
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if value.size >= SMALLEST_WEIGHT and np.array_equal(half.astype(np.float32), value):
            node.output(0).replace(opset13.convert(opset13.constant(half), "f32").output(0))


def _write_index(folder: Path, parts: Mapping[str, Path]) -> None:
    """Write `index.json` into `folder`, which holds the parts' graphs; `parts` names each one's weights."""
    found = {
        part: {"weights": f"{PARTS[part]}/{path.name}", "size": path.stat().st_size, "sha256": sha256(path)}
        for part, path in parts.items()
    }
    index = {"format": FORMAT, "openvino": str(openvino.__version__), "parts": found}
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n")


def _point_into_weights(graph: str, constants: bytes, weights: Path) -> tuple[str, bytes]:
    """A graph that points into `constants`, changed to point into the space of a `SharedGraph`; and the constants that
    are not in `weights`, the safetensors file that holds most of them byte for byte.
    """
    places = _tensor_places(weights)
    start = aligned(weights.stat().st_size)
    rest = bytearray()
    moved: dict[bytes, int] = {}

    def move(match: re.Match[str]) -> str:
        offset, size = int(match[2]), int(match[4])
        value = constants[offset : offset + size]
        place = places.get(value) if size >= SMALLEST_SHARED else None
        if place is None and value not in moved:
            rest.extend(bytes(aligned(len(rest)) - len(rest)))
            moved[value] = start + len(rest)
            rest.extend(value)
        return f"{match[1]}{moved[value] if place is None else place}{match[3]}{size}{match[5]}"

    graph = EMPTY_INFO.sub("", ORIGINS.sub("", graph))
    return CONSTANT.sub(move, graph), bytes(rest)


def _tensor_places(weights: Path) -> dict[bytes, int]:
    """The bytes of every tensor in a safetensors file -> where in the file they start."""
    data = weights.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8:start])
    tensors.pop("__metadata__", None)
    spans = [at["data_offsets"] for at in tensors.values()]
    return {data[start + first : start + last]: start + first for first, last in spans}


# --- the check --------------------------------------------------------------------------------------------------------


def _check_openvino(info: ModelInfo) -> None:
    """Compare every network with torch's, in float32."""
    slow, fast = TorchEngine(info, device="cpu", dtype="float32"), OpenVinoEngine(info, dtype="float32")
    generator = np.random.default_rng(0)
    conditioning, twin = slow.encode(["a red apple", ""]), fast.encode(["a red apple", ""])
    latents = generator.standard_normal((2, *info.latent_shape)).astype(np.float32)
    pictures = generator.integers(0, 256, (2, info.height, info.width, 3), dtype=np.uint8)
    last = info.schedule.num_train_timesteps - 1
    pairs = {
        "text_encoder": (conditioning.states, twin.states),
        "unet": (slow.denoise(latents, last, conditioning), fast.denoise(latents, last, conditioning)),
        "decoder": (slow.decode(latents).astype(np.float32), fast.decode(latents).astype(np.float32)),
        "encoder": (slow.encode_image(pictures), fast.encode_image(pictures)),
    }
    for part, (expected, found) in pairs.items():
        difference = np.abs(expected - found).max() / max(np.abs(expected).max(), 1e-6)
        if not difference <= (2 / 255 if part == "decoder" else MOST_DIFFERENCE):
            raise CheckpointError(f"OpenVINO's {part} differs from torch's by {difference:.1%}; its form was removed.")
