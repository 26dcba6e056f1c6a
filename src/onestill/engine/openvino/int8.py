"""int8 for OpenVINO's graphs, made from the float16 weights when a network is first compiled; no copy is stored.

`openvino/int8.json` names, for each network that int8 draws well enough, the layers that compute in it and how:

    a range [low, high]   of the layer's input, measured when the model was exported (`onestill.export.calibrate`). The
                          graph gets FakeQuantize on the input and, channel by channel, on the weights; OpenVINO makes
                          an int8 layer of that. The same numbers whatever else is in the batch.
    null                  nothing is measured: weights in int8, a scale for each GROUP of inputs, and OpenVINO finds the
                          scale of every GROUP of numbers of a token as they come. For the text encoder, whose largest
                          numbers are a hundred times the others; no token meets another, so no image of a batch does.

A layer is a convolution or a product with constant weights. B batch, K tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import opset13

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import read_json
from onestill.engine.openvino.ir import FOLDER, PARTS
from onestill.errors import CheckpointError

__all__ = ["DYNAMIC", "INT8", "Int8", "Layers", "has_int8", "layer_nodes", "quantize", "read_int8"]

INT8 = "int8.json"
FORMAT = 1
GROUP = 64
DYNAMIC: Mapping[str, Any] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP}  # without it OpenVINO would compute in float32
LEAST = 1e-8  # of a scale, as weights may be zeros

Layers = Mapping[str, tuple[float, float] | None]  # a layer's name in the graph -> its input's range, or None


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
        if found["format"] != FORMAT:
            raise CheckpointError(f"'{folder}' has an int8 form of another version; update onestill, or export again.")
        parts = {
            part: {str(name): None if at is None else (float(at[0]), float(at[1])) for name, at in one.items()}
            for part, one in found["parts"].items()
            if part in PARTS
        }
        return Int8(parts, {name: float(value) for name, value in found["psnr_db"].items()}, int(found["pictures"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"'{folder}/{FOLDER}/{INT8}' is damaged; copy the model again.") from error


def layer_nodes(model: Any) -> dict[str, Any]:
    """The layers of a graph that may compute in int8, by name.

    Not those that read an input of the graph, where rounding is heard all the way (7 dB of the worst
    picture), nor those of one row, which are over too soon to be worth it.
    """
    found = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Convolution", "MatMul") or _constant(node.input_value(1)) is None:
            continue
        if node.get_type_name() == "MatMul":
            straight = not node.get_attributes()["transpose_a"] and node.get_attributes()["transpose_b"]
            if not straight or len(node.input_value(1).get_shape()) != 2 or _rows(node) == 1:
                continue
        if node.input_value(0).get_node().get_type_name() != "Parameter":
            found[node.get_friendly_name()] = node
    return found


def quantize(model: Any, layers: Layers) -> None:
    """Rewrite a graph so that OpenVINO computes `layers` in int8.

    Args:
        model: of static shapes.
        layers: as in `Int8.parts`.

    Raises:
        CheckpointError: the graph has no such layer.
    """
    known = layer_nodes(model)
    unknown = sorted(layers.keys() - known.keys())
    if unknown:
        raise CheckpointError(f"The int8 form names '{unknown[0]}', which its graph lacks; export the model again.")
    rounded: dict[tuple[str, int], Any] = {}  # a tensor that several layers read is rounded once
    for name, at in layers.items():
        node = known[name]
        if at is None:
            node.input(1).replace_source_output(_grouped(node).output(0))
            continue
        source = node.input_value(0)
        key = (source.get_node().get_friendly_name(), source.get_index())
        if key not in rounded:
            low, high = _with_zero(*at)
            rounded[key] = _fake(source, np.array([low]), np.array([high]), levels=256)
        node.input(0).replace_source_output(rounded[key].output(0))
        weights = _weights(node)
        most = np.maximum(np.abs(weights).max(axis=tuple(range(1, weights.ndim)), keepdims=True), LEAST)
        node.input(1).replace_source_output(_fake(node.input_value(1), -most, most, levels=255).output(0))
    model.validate_nodes_and_infer_types()


def _fake(source: Any, low: NDArray[Any], high: NDArray[Any], levels: int) -> Any:
    bounds = [opset13.constant(bound.astype(np.float32)) for bound in (low, high)]
    return opset13.fake_quantize(source, *bounds, *bounds, levels)


def _with_zero(low: float, high: float) -> tuple[float, float]:
    """The range, moved so that zero is one of its 256 levels: then padding is exact."""
    low, high = min(low, 0.0), max(high, LEAST)
    step = (high - low) / 255
    zero = round(-low / step)
    return -zero * step, (255 - zero) * step


def _grouped(node: Any) -> Any:
    """A layer's weights [D_out, D_in] as int8; the scale is a whole row's where GROUP does not divide it."""
    weights = _weights(node)
    group = GROUP if weights.shape[1] % GROUP == 0 else weights.shape[1]
    groups = weights.reshape(weights.shape[0], -1, group)
    scale = np.maximum(np.abs(groups).max(axis=2, keepdims=True), LEAST) / 127
    whole = opset13.convert(opset13.constant(np.rint(groups / scale).astype(np.int8)), "f32")
    product = opset13.multiply(whole, opset13.constant(scale.astype(np.float32)))
    return opset13.reshape(product, opset13.constant(np.array(weights.shape, dtype=np.int64)), special_zero=False)


def _weights(node: Any) -> NDArray[np.float32]:
    value: NDArray[Any] = _constant(node.input_value(1)).data
    return value.astype(np.float32).reshape(list(node.input_value(1).get_shape()))


def _constant(output: Any) -> Any:
    """The constant behind an input, through a change of type or shape; None where there is none."""
    node = output.get_node()
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _rows(node: Any) -> int:
    shape = node.input_value(0).get_partial_shape()
    return math.prod(dimension.get_length() for dimension in list(shape)[1:-1] if dimension.is_static)
