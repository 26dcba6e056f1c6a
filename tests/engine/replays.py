"""Graphs for a CPU, with what is awkward about CUDA's: fixed inputs and outputs, and memory that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from onestill.engine.torch.cuda_graphs import WARM_UPS, Recorder


class Replays(Recorder):
    """Replays by calling the function on the inputs it was recorded with, into the outputs it had then.

    Whatever other graphs have returned is spoilt by that, as where they share memory it may be.
    """

    def __init__(self) -> None:
        self.recordings = 0
        self._outputs: list[list[Tensor]] = []

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.recordings += 1
        for _ in range(WARM_UPS):
            function()
        outputs = function()
        mine = tensors(outputs)
        self._outputs.append(mine)

        def run() -> Any:
            for other in self._outputs:
                if other is not mine:
                    for tensor in other:
                        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
            for tensor, new in zip(mine, tensors(function()), strict=True):
                tensor.copy_(new)
            return outputs

        return run

    def reset(self) -> None:
        self._outputs.clear()


def tensors(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]
