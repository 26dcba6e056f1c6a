"""Rewriting OpenVINO's graphs so that products are computed in int8. Three ways, for three kinds of weights.

    quantize            float weights, layer by layer. A layer with a range [low, high] of its input, measured when the
                        model was exported (`onestill.export.calibrate`), gets FakeQuantize on the input and, channel
                        by channel, on the weights; OpenVINO makes an int8 layer of that. The same numbers whatever else
                        is in the batch. A layer with no range has weights in int8, with a scale for each GROUP of
                        inputs, and OpenVINO finds the scale of every GROUP of numbers of a token as they come. That is
                        for the text encoder, whose largest numbers are a hundred times the others; no token meets
                        another, so no image of a batch does.
    store_weights       float weights -> int8 ones with a scale for each row, to be saved in half the size.
    round_inputs        a graph with such weights: the inputs of its products are rounded to int8 too, by the largest
                        number of each image or row, so that nothing has to be calibrated.

A layer is a convolution or a product with constant weights. B batch, K tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from onestill.engine.openvino.runtime import openvino, opset13

import numpy as np
from numpy.typing import NDArray

from onestill.errors import CheckpointError

GROUP = 64
DYNAMIC: Mapping[str, Any] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP}  # without it OpenVINO would compute in float32
LEAST = 1e-8  # of a range, as weights may be zeros
LEAST_SCALED = 1e-12  # of the largest number of a row of weights, likewise
ROWS = 32  # of weights that are rounded together, as so few stay in the processor's cache
SMALLEST_INT8 = 2**14  # numbers; a smaller constant is stored as it is
INPUT_AXES = {"Convolution": (1, 2, 3), "MatMul": (-1,)}  # of a product's input, which are rounded by one scale
# By what computes an input x: the lowest that x / s gets, and the least s for which that holds. Of the 256 steps from
# there to 1, one must be 0, which pads pictures; and SiLU, never under -0.2785, leaves most of them to what is above 0.
LIMITS = {"Relu": (0.0, 1e-12), "Swish": (-0.25, 1.12)}
OTHER_LIMITS = (-128 / 127, 1e-12)

Layers = Mapping[str, tuple[float, float] | None]  # a layer's name in the graph -> its input's range, or None


# --- float weights, layer by layer ----------------------------------------------------------------------------------


def layer_nodes(model: Any) -> dict[str, Any]:
    """The layers of a graph that `quantize` may rewrite, by name.

    Not those that read an input of the graph, where rounding costs 7 dB of the worst picture, nor those of one row,
    which are over too soon to be worth it.
    """
    found = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Convolution", "MatMul") or _constant(node.input_value(1)) is None:
            continue
        if node.get_type_name() == "MatMul":
            straight = not node.get_attributes()["transpose_a"] and node.get_attributes()["transpose_b"]
            if not straight or len(node.input_value(1).get_shape()) != 2 or _row_count(node) == 1:
                continue
        if node.input_value(0).get_node().get_type_name() != "Parameter":
            found[node.get_friendly_name()] = node
    return found


def quantize(model: Any, layers: Layers) -> None:
    """Rewrite a graph so that OpenVINO computes `layers` in int8.

    Args:
        model: of static shapes.
        layers: a layer's name -> the range of its input, or None.

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
        weights = _weights(node)
        if at is None:
            node.input(1).replace_source_output(_grouped(weights).output(0))
            continue
        source = node.input_value(0)
        key = (source.get_node().get_friendly_name(), source.get_index())
        if key not in rounded:
            low, high = _with_zero(*at)
            rounded[key] = _fake_quantize(source, np.array([low]), np.array([high]), levels=256)
        node.input(0).replace_source_output(rounded[key].output(0))
        most = np.maximum(np.abs(weights).max(axis=tuple(range(1, weights.ndim)), keepdims=True), LEAST)
        node.input(1).replace_source_output(_fake_quantize(node.input_value(1), -most, most, levels=255).output(0))
    model.validate_nodes_and_infer_types()


def _fake_quantize(source: Any, low: NDArray[Any], high: NDArray[Any], levels: int) -> Any:
    bounds = [opset13.constant(bound.astype(np.float32)) for bound in (low, high)]
    return opset13.fake_quantize(source, *bounds, *bounds, levels)


def _with_zero(low: float, high: float) -> tuple[float, float]:
    """The range, moved so that zero is one of its 256 levels: then padding is exact."""
    low, high = min(low, 0.0), max(high, LEAST)
    step = (high - low) / 255
    zero = round(-low / step)
    return -zero * step, (255 - zero) * step


def _grouped(weights: NDArray[np.float32]) -> Any:
    """Weights [D_out, D_in] as int8; the scale is a whole row's where GROUP does not divide it."""
    group = GROUP if weights.shape[1] % GROUP == 0 else weights.shape[1]
    product = _int8_product(weights.reshape(weights.shape[0], -1, group), axes=1)
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


def _row_count(node: Any) -> int:
    shape = node.input_value(0).get_partial_shape()
    return math.prod(dimension.get_length() for dimension in list(shape)[1:-1] if dimension.is_static)


# --- int8 weights ---------------------------------------------------------------------------------------------------


def store_weights(model: Any) -> None:
    """Turn the larger constants that products read into int8, each row with a scale of its own."""
    for node in model.get_ordered_ops():
        if node.get_type_name() not in INPUT_AXES:
            continue
        constant = node.input_value(1).get_node()
        if constant.get_type_name() == "Convert":  # from half precision
            constant = constant.input_value(0).get_node()
        if constant.get_type_name() == "Constant" and _is_worth_int8(constant, node):
            node.input(1).replace_source_output(_int8_product(constant.data, axes=constant.data.ndim - 1).output(0))
    model.validate_nodes_and_infer_types()


def _is_worth_int8(constant: Any, product: Any) -> bool:
    shape = list(constant.shape)
    # A row must be what one output is summed from.
    by_rows = product.get_type_name() == "Convolution" or product.get_attributes()["transpose_b"]
    return by_rows and len(shape) > 1 and math.prod(shape) >= SMALLEST_INT8


def _int8_product(weights: NDArray[Any], axes: int) -> Any:
    """Weights as int8 times a float32 scale for all numbers of their last `axes` axes.

    Exactly so OpenVINO knows weights that need not be unpacked before they are multiplied.
    """
    outer = weights.shape[: weights.ndim - axes]
    rows = weights.reshape(math.prod(outer), -1)
    whole = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), 1), np.float32)
    for i in range(0, len(rows), ROWS):
        some = rows[i : i + ROWS].astype(np.float32)
        largest = np.maximum(some.max(axis=1, keepdims=True), -some.min(axis=1, keepdims=True))
        scales[i : i + ROWS] = np.maximum(largest, LEAST_SCALED) / 127
        some /= scales[i : i + ROWS]
        whole[i : i + ROWS] = np.rint(some, out=some)
    numbers = opset13.convert(opset13.constant(whole.reshape(weights.shape)), "f32")
    return opset13.multiply(numbers, opset13.constant(scales.reshape(*outer, *[1] * axes)))


def round_inputs(model: Any) -> None:
    """Round what goes into each product with int8 weights to int8, by the largest number of the image or of the row.

    A product is linear: that of x / s, times s, is that of x. Written so, the rounding has fixed limits, which is what
    OpenVINO computes in int8.
    """
    known: dict[tuple[str, int, str], tuple[Any, Any]] = {}  # what several products read is rounded once
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in INPUT_AXES or not _is_int8(node.input_value(1).get_node()):
            continue
        if kind == "MatMul" and node.get_attributes()["transpose_a"]:
            continue  # its rows are columns here; OpenVINO rounds them by groups
        readers = node.output(0).get_target_inputs()
        x = node.input_value(0)
        key = (x.get_node().get_name(), x.get_index(), kind)
        if key not in known:
            low, least = LIMITS.get(x.get_node().get_type_name(), OTHER_LIMITS)
            largest = opset13.reduce_max(opset13.abs(x), opset13.constant(np.array(INPUT_AXES[kind])), True)
            scale = opset13.maximum(largest, opset13.constant(np.float32(least)))
            limits = [opset13.constant(np.float32(limit)) for limit in (low, 1, low, 1)]
            known[key] = scale, opset13.fake_quantize(opset13.divide(x, scale), *limits, 256)
        scale, rounded = known[key]
        node.input(0).replace_source_output(rounded.output(0))
        scaled = opset13.multiply(node.output(0), scale)
        for reader in readers:
            reader.replace_source_output(scaled.output(0))
    model.validate_nodes_and_infer_types()


def _is_int8(weight: Any) -> bool:
    """Whether weights are int8 times a scale, as `store_weights` leaves them."""
    if weight.get_type_name() != "Multiply":
        return False
    whole = weight.input_value(0).get_node()
    return bool(whole.get_type_name() == "Convert" and whole.get_input_element_type(0) == openvino.Type.i8)
