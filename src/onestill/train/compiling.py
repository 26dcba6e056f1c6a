"""torch.compile in training: what of it a device gains by.

A GPU that runs small networks stands still between their kernels, which Python cannot name as fast as they are done. So
there whole networks are recorded as CUDA graphs; a CPU gains by fused loops alone. A compiled network shares its
weights with what it was made from, which keeps its names in checkpoints and exports.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from onestill.train.recipe import LoopOptions

T = TypeVar("T")
BACKEND = "inductor"


def compiled(what: T, loop: LoopOptions, device: torch.device) -> T:
    """A network or a function of tensors, compiled for each shape that it meets; itself where `loop.compile` is off.

    What it gives on a GPU lasts until `next_iteration`.
    """
    if not loop.compile:
        return what
    made: Any = torch.compile(what, dynamic=False, backend=BACKEND, mode=mode(loop, device))  # type: ignore[call-overload]
    return made  # type: ignore[no-any-return]


def mode(loop: LoopOptions, device: torch.device) -> str | None:
    """torch.compile's mode. FSDP2 puts weights together in new memory each time, which a CUDA graph cannot follow."""
    return "reduce-overhead" if device.type == "cuda" and loop.parallel != "fsdp" else None


def next_iteration(loop: LoopOptions, device: torch.device) -> None:
    """Let CUDA graphs use the memory of what they gave in the iteration before."""
    if loop.compile and mode(loop, device):
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
