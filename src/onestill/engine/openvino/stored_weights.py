"""Graphs with weights of their own, as OpenVINO stores them: Stable Diffusion's families and SDXL, without torch.

`onestill.export.stored_weights` writes them. OpenVINO maps the weights from their files. Each network is compiled for
the size that is asked for when it is: static shapes run fastest, and compiling takes seconds where drawing does too.

A form whose weights are int8 is computed in int8 too, unless another type is asked for. What goes into a product is
then rounded to int8 as it comes, by its own largest number, so that nothing has to be calibrated: in text encoders by
OpenVINO, by groups of a token's numbers, as a few of those are a hundred times the others; elsewhere by tokens and, for
convolutions, by images, in the graph, which is faster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from onestill.checkpoint import ModelInfo, read_json
from onestill.engine.memory import check_memory_left
from onestill.engine.openvino.cpu import fastest_float, lacks_vnni
from onestill.engine.openvino.int8 import round_inputs
from onestill.engine.openvino.network import Graph, static_shapes
from onestill.errors import CheckpointError

FOLDER = "openvino"
FORM = "sd-1"  # of the index; others are of other versions, or share their weights
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # of what is not a product of int8 weights
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight in memory
GROUP = 128  # numbers of a row that OpenVINO rounds to int8 together; 32, its own choice, is a third slower


@dataclass(frozen=True)
class _Graph(Graph):
    rounds_inputs: bool

    def fingerprint(self) -> str:
        """Of the graph's text, and of its weights the size and time: gigabytes, which `verify` has read already."""
        try:
            stored = self.path.with_suffix(".bin").stat()
            graph = hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise CheckpointError(f"'{error.filename}' cannot be read; copy the whole model again.") from error
        return f"{graph} {stored.st_size} {stored.st_mtime_ns} {self.rounds_inputs}"

    def read(self, core: Any, shape: tuple[int, ...]) -> tuple[Any, None]:
        """OpenVINO maps the weights and owns that."""
        model = core.read_model(str(self.path))
        model.reshape(static_shapes(model, shape))
        if self.rounds_inputs:
            round_inputs(model)
        return model, None


class StoredWeights:
    """A model's networks in this form.

    Args:
        info: the model; its folder must have the form.

    Raises:
        CheckpointError: there is no index.
    """

    is_large = True

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._folder = info.path / FOLDER
        index = read_json(self._folder, "index.json")
        self.has_int8 = index.get("weights") == "int8"
        self.decoder_scale = float(index["decoder_scale"])
        self.decoder_mean, self.decoder_std = index.get("decoder_statistics", ((), ()))

    def fastest_dtype(self, core: Any) -> str:
        """What the CPU computes this form fastest in."""
        # Where OpenVINO has int8 at all, as the same weights in a wider type take more memory, too.
        if self.has_int8 and "INT8" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") and not lacks_vnni():
            return "int8"
        return fastest_float(core)

    def graphs(self, core: Any, dtype: str) -> Iterator[_Graph]:
        """Every network, to be computed in `dtype`.

        Raises:
            NotEnoughMemoryError: the weights do not fit into memory.
        """
        del core
        self._check_memory(dtype)
        texts = self._info.text_encoders
        # The group is given even where it is 0, as OpenVINO rounds to int8 by default where the weights are.
        group = GROUP if dtype == "int8" else 0
        for name in (*texts, "unet", "decoder", "encoder"):
            yield self._graph(name, PRECISIONS[dtype], group, rounds_inputs=dtype == "int8" and name not in texts)
        yield self._graph("time", "f32", 0, rounds_inputs=False)

    def _graph(self, name: str, precision: str, group: int, *, rounds_inputs: bool) -> _Graph:
        options = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        return _Graph(name, self._folder / f"{name}.xml", options, rounds_inputs)

    def _check_memory(self, dtype: str) -> None:
        stored = sum(file.stat().st_size for file in self._folder.glob("*.bin") if file.stem != "encoder")
        count = stored // (1 if self.has_int8 else 2)
        smaller = "load it with dtype 'int8'" if self.has_int8 else "export it with --weights int8"
        if dtype == "int8":
            smaller = "choose a smaller model"
        check_memory_left(self._info.name, count * BYTES[dtype], dtype, smaller)
