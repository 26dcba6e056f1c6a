"""CUDA graphs of functions of tensors: one for each set of shapes, recorded when it is asked for again. `[torch]`

A diffusion UNet is thousands of small kernels, and launching them from Python takes several times as long as running
them. A graph launches them all at once, but only for the same shapes and in the same memory.
"""

from __future__ import annotations

import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from onestill.engine.memory import is_memory_error

MOST_GRAPHS = 16  # of a function; each holds the memory of one call
MOST_SHAPES = 512  # sets of shapes that are remembered as asked for once
WARM_UPS = 3  # calls before a recording, in which libraries choose and prepare their kernels

_recording = threading.Lock()  # CUDA lets a process record one graph at a time, whatever the device

Shapes = tuple[tuple[Any, ...] | None, ...]


class Recorder:
    """Makes graphs of functions. What is special to a device is `record` and `reset`."""

    def recorded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A function without arguments as a graph: calling it computes the same anew, in the same memory.

        What it returns is overwritten by the next call of any graph. One graph is recorded at a time in a process.
        """
        with _recording:
            return self.record(function)

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """As `recorded`, by this device, while nothing else in the process is recorded."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget the memory of all graphs, of which none may be called any more."""
        raise NotImplementedError


class Graphs(Recorder):
    """Records CUDA graphs that share their memory and follow each other on a stream of their own device.

    The stream is given because torch's default one is the first GPU's: what another GPU computes meanwhile would be
    recorded by nobody, and the graph would replay nothing.

    Args:
        device: a GPU, with its number. It must be the current one when a graph is recorded or called.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """See `Recorder.recorded`."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        # Around the recording too, as torch's own context leaves its stream current where a recording fails.
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function()
            graph = torch.cuda.CUDAGraph()
            # Other threads may encode a picture meanwhile, which only they themselves must not do while recording.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = function()
        current.wait_stream(self._stream)

        def run() -> Any:
            graph.replay()
            return outputs

        return run

    def reset(self) -> None:
        """See `Recorder.reset`. The memory is free only when the last graph in it is gone."""
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


class Buckets:
    """A function of tensors that runs as it is for shapes it sees first, and as a graph from the second time on.

    A recording costs some calls, and memory as long as the graph lives; a shape that is asked for once never repays
    that. The caller makes sure that one thread at a time calls it.

    Args:
        function: takes tensors, some of which may be None, and returns tensors. It must not hold on to them.
        device: where it computes.
        recorder: makes the graphs; None for none.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, recorder: Recorder | None) -> None:
        self._function, self._device, self._recorder = function, device, recorder
        self._graphs: OrderedDict[Shapes, _Graph] = OrderedDict()
        self._seen: OrderedDict[Shapes, None] = OrderedDict()
        self._too_large: set[Shapes] = set()
        self.first_uses = 0  # calls with shapes that were not seen before

    @property
    def graphs(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def __call__(self, *inputs: Tensor | None) -> Any:
        """The function of tensors that are on the device or the CPU. Overwritten by the next call of any graph.

        Raises:
            RuntimeError: memory ran out, in torch's words.
        """
        shapes: Shapes = tuple(None if one is None else (one.dtype, *one.shape) for one in inputs)
        if (graph := self._graphs.get(shapes)) is not None:
            self._graphs.move_to_end(shapes)
            return graph(inputs)
        if not self._was_seen(shapes) or self._recorder is None or shapes in self._too_large:
            return self._function(*(None if one is None else on_device(one, self._device) for one in inputs))
        return self._record(shapes, inputs, self._recorder)

    def forget(self) -> None:
        """Drop all graphs. The shapes seen so far are remembered, as what was compiled for them stays."""
        self._graphs.clear()

    def _was_seen(self, shapes: Shapes) -> bool:
        was_seen = shapes in self._seen
        self._seen[shapes] = None
        self._seen.move_to_end(shapes)
        if len(self._seen) > MOST_SHAPES:
            self._seen.popitem(last=False)
        self.first_uses += not was_seen
        return was_seen

    def _record(self, shapes: Shapes, inputs: tuple[Tensor | None, ...], recorder: Recorder) -> Any:
        try:
            graph = _Graph(self._function, inputs, self._device, recorder)
        except RuntimeError as error:
            # Running out within a recording ends it, of which torch may then speak in place of the reason.
            if not is_memory_error(error) and not is_memory_error(error.__context__ or error):
                raise
            # A graph needs memory beside that of other graphs; the call itself may do without.
            traceback.clear_frames(error.__traceback__)
        else:
            self._graphs[shapes] = graph
            while len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
            return graph.run()
        self._too_large.add(shapes)
        return self(*inputs)


class _Graph:
    def __init__(
        self,
        function: Callable[..., Any],
        inputs: tuple[Tensor | None, ...],
        device: torch.device,
        recorder: Recorder,
    ) -> None:
        # A graph reads its inputs from fixed addresses, so what a caller passes is copied there.
        self._inputs = [None if one is None else on_device(one, device).clone() for one in inputs]
        self.run = recorder.recorded(lambda: function(*self._inputs))

    def __call__(self, inputs: tuple[Tensor | None, ...]) -> Any:
        for mine, new in zip(self._inputs, inputs, strict=True):
            if mine is not None and new is not None:
                mine.copy_(pinned(new, mine.device), non_blocking=True)
        return self.run()


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, copied there without waiting for it."""
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU in memory that a GPU reads by itself, where `device` is one; others as they are."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
