"""torch.compile in training: networks traced once, and on a GPU recorded as CUDA graphs.

A GPU that runs small networks stands still between their kernels, which Python cannot name as fast as they are done. As
a graph they are named at once. Kernels stay torch's own: of those that inductor writes, torch 2.13's gave no gradient
to a third of a channels-last UNet (seen on a CPU, where they were no faster either), and writing them takes minutes.

A compiled network shares its weights with what it was made from, which keeps its names in checkpoints and exports.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from onestill.train.recipe import LoopOptions

T = TypeVar("T")


def compiled(what: T, loop: LoopOptions, device: torch.device) -> T:
    """A network or a function of tensors, compiled for each shape that it meets; itself where `loop.compile` is off.

    What it gives on a GPU lasts until `next_iteration`.
    """
    if not loop.compile:
        return what
    backend = "cudagraphs" if graphs(loop, device) else "aot_eager"
    made: Any = torch.compile(what, dynamic=False, backend=backend)  # type: ignore[call-overload]
    return made  # type: ignore[no-any-return]


def graphs(loop: LoopOptions, device: torch.device) -> bool:
    """Whether compiled networks become CUDA graphs: not under FSDP2, which puts weights together in new memory."""
    return device.type == "cuda" and loop.parallel != "fsdp"


def next_iteration(loop: LoopOptions, device: torch.device) -> None:
    """Let CUDA graphs use the memory of what they gave in the iteration before."""
    if loop.compile and graphs(loop, device):
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
