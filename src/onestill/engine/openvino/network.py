"""One network on OpenVINO: read from its source, compiled for the shapes that are asked for, run by any thread."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestill.engine.memory import explain_oom, is_memory_error
from onestill.engine.openvino.compile_cache import compile_into_folder, compile_to_blob, network_key
from onestill.errors import CheckpointError

LARGEST_BATCH = 4  # images to a call; each batch size is compiled for itself, as static shapes run fastest
WORTH_COMPILING = 8  # images asked for at once; fewer are done one by one before a larger batch would have compiled

Float = NDArray[np.float32]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Graph(ABC):
    """One network as a source of weights has it.

    Attributes:
        name: such as "unet"; the cache names files by it.
        path: the file of the graph, for error messages.
        options: how OpenVINO is to compile it.
    """

    name: str
    path: Path
    options: Mapping[str, Any]

    @abstractmethod
    def fingerprint(self) -> str:
        """What changes when the network does."""

    @abstractmethod
    def read(self, core: Any, shape: Shape) -> tuple[Any, Any]:
        """The network with static shapes, for a first input of `shape`.

        Returns:
            OpenVINO's model, and the memory that its constants point into, which must outlive it.
        """


def static_shapes(model: Any, shape: Shape) -> dict[str, list[int]]:
    """The shapes of a graph's inputs where the first one has `shape`: a batch is the only free axis of the others."""
    first, *others = model.inputs
    free = {port.any_name: port.partial_shape for port in others}
    batch = {
        name: [shape[0] if axis.is_dynamic else axis.get_length() for axis in partial] for name, partial in free.items()
    }
    return {first.any_name: list(shape), **batch}


@dataclass
class _Compiled:
    network: Any
    memory: Any  # that the network points into; OpenVINO does not own it
    idle: list[Any] = field(default_factory=list)  # infer requests that no thread is using


class Network:
    """A network, compiled for each shape of its first input when that is first asked for. Safe in many threads.

    Args:
        core: OpenVINO's.
        graph: where the network comes from.
        options: OpenVINO's, for compiling it.
        is_large: the network fills the memory and the CPU by itself. Then one thread at a time runs it, for one image,
            and it is compiled for the last shape alone; only that of `load` is cached, as its weights are too.
    """

    def __init__(self, core: Any, graph: Graph, options: Mapping[str, Any], *, is_large: bool) -> None:
        self.is_large = is_large
        self._core, self._graph, self._options = core, graph, options
        self._compiling = threading.Lock()
        self._running = threading.Lock() if is_large else nullcontext()
        self._compiled: dict[Shape, _Compiled] = {}

    def load(self, shape: Shape, *, runs: bool) -> None:
        """Load the network for a first input of `shape`; where it `runs`, once, which prepares its kernels too."""
        with explain_oom("cpu", "hold the model"), self._running:
            network = self._for(shape, cached=True).network
        if runs:
            self._run(
                {port.any_name: np.zeros(list(port.shape), port.element_type.to_dtype()) for port in network.inputs}
            )

    def __call__(self, inputs: Mapping[str, NDArray[Any]], **shared: NDArray[Any]) -> list[Float]:
        """Run B images, in batches of the sizes there are.

        Args:
            inputs: the network's, whose first axis is B; the graph's first input first.
            shared: inputs that are the same for every image.

        Returns:
            Every output.
        """
        first = next(iter(inputs.values()))
        total, start = len(first), 0
        has_batch = not self.is_large and (
            total >= WORTH_COMPILING or (LARGEST_BATCH, *first.shape[1:]) in self._compiled
        )
        outputs = []
        while start < total:
            size = LARGEST_BATCH if has_batch and total - start >= LARGEST_BATCH else 1
            batch = {name: np.ascontiguousarray(value[start : start + size]) for name, value in inputs.items()}
            outputs.append(self._run({**batch, **shared}))
            start += size
        return outputs[0] if len(outputs) == 1 else [np.concatenate(each) for each in zip(*outputs, strict=True)]

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> list[Float]:
        shape = next(iter(inputs.values())).shape
        with explain_oom("cpu", f"run '{self._graph.name}' at this size"), self._request(shape) as request:
            request.infer(inputs)
            count = len(request.model_outputs)
            # Copies, as the next call writes to the same memory.
            return [np.array(request.get_output_tensor(i).data, dtype=np.float32) for i in range(count)]

    @contextmanager
    def _request(self, shape: Shape) -> Iterator[Any]:
        with self._running:
            compiled = self._for(shape)
            try:
                request = compiled.idle.pop()
            except IndexError:
                request = compiled.network.create_infer_request()
            yield request
            compiled.idle.append(request)

    def _for(self, shape: Shape, *, cached: bool = False) -> _Compiled:
        with self._compiling:
            if shape not in self._compiled:
                if self.is_large:
                    self._compiled.clear()  # before compiling, as two of the largest network would not fit into memory
                self._compiled[shape] = self._compile(shape, cached=cached)
            return self._compiled[shape]

    def _compile(self, shape: Shape, *, cached: bool) -> _Compiled:
        def read() -> tuple[Any, Any]:
            return self._graph.read(self._core, shape)

        name = self._graph.name
        key = network_key(self._core, self._options, self._graph.fingerprint(), repr(shape))
        try:
            if not self.is_large:
                return _Compiled(*compile_to_blob(self._core, f"{name}-{key}", self._options, read))
            model, memory = read()
            if cached:
                size = self._graph.path.with_suffix(".bin").stat().st_size
                return _Compiled(compile_into_folder(self._core, f"{name}-{key}", self._options, model, size), memory)
            return _Compiled(self._core.compile_model(model, "CPU", self._options), memory)
        except RuntimeError as error:
            if is_memory_error(error):
                raise
            raise CheckpointError(
                f"OpenVINO cannot load '{self._graph.path}' for an input of {shape}; copy or export the model again."
            ) from error
