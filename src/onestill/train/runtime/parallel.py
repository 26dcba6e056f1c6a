"""Several processes: who they are, gradients averaged over them, networks sharded among them.

Launched by torchrun or accelerate, which tell each process its rank; gloo on CPUs, nccl on GPUs. Two forms:

    ddp     every process holds all; the gradients of each loss are averaged before its optimizer steps. Not by torch's
            wrapper: two optimizers, several forwards for one backward, R1's double backward and heads that are frozen
            for the student's loss are each a trap of its own there, and none here.
    fsdp    torch's FSDP2 (`fully_shard`): parameters, gradients, moments and averages of what trains are split among
            the processes, layer group by layer group; the teacher too, if asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from onestill.engine.device import is_cpu

BUCKET = 16 * 2**20  # elements sent together, 64 MB in float32


def start(device: str) -> None:
    """Meet the other processes, if a launcher started several; once in a process's life."""
    PartialState(cpu=is_cpu(device))


def device() -> torch.device:
    """This process's own device, among several."""
    return PartialState().device  # type: ignore[no-any-return]


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files."""
    return rank() == 0


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


def gathered(value: Any) -> list[Any]:
    """Each process's `value`, by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def stacked(rows: Tensor) -> Tensor:
    """Each process's `rows` [n, ...], by rank: [world, n, ...]. Without a gradient."""
    if world() == 1:
        return rows.unsqueeze(0)
    every = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(every, rows.contiguous())
    return torch.stack(every)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes. Sharded ones are that already."""
    if world() == 1:
        return
    # A parameter that some loss does not reach on one process must still be met by its fellows: zeros stand in.
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    for p in plain:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in plain if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world()
        for gradient, part in zip(bucket, torch.split(flat, [gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def shard(network: nn.Module, *, bf16: bool) -> None:
    """Split a network's parameters among the processes, in place: each group of blocks by itself, then the rest.

    A network without blocks, as the heads are, is put together for a whole loss, until `reshard`: R1 differentiates
    twice through it, and FSDP2 would let its weights go after the first time.

    Args:
        bf16: gather the weights of blocks in bfloat16; gradients are reduced in float32 all the same.
    """
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload] # all that FSDP2 splits
    kind = "cuda" if next(network.parameters()).is_cuda else "cpu"
    mesh = init_device_mesh(kind, (world(),))
    blocks = _blocks(network)
    # Heads stay in float32: spectral norm multiplies their weights with buffers of that type, and they are small.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 and blocks else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    root = fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=bool(blocks))
    root.set_reshard_after_backward(bool(blocks))


def reshard(networks: Iterable[nn.Module]) -> None:
    """Let go of what a loss had put together, so that the next forward gathers the weights as they are now."""
    for network in networks:
        if isinstance(network, FSDPModule):
            network.reshard()


def repoint(optimizers: Iterable[torch.optim.Optimizer], before: dict[str, nn.Parameter], network: nn.Module) -> None:
    """Give optimizers the parameters that `shard` put in the place of those of `before`, by their names."""
    after = dict(network.named_parameters())
    new = {id(parameter): after[name] for name, parameter in before.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new.get(id(p), p) for p in group["params"]]


def whole(value: Tensor) -> Tensor:
    """A sharded tensor put together; every process must ask. Others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor, as a plain tensor that shares its memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def like(value: Tensor, sharded: Tensor) -> Tensor:
    """`value`, the same everywhere, split as `sharded` is."""
    if not isinstance(sharded, DTensor):
        return value
    return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """A UNet's blocks, from the outside in; nothing for small networks, which are one group."""
    found: list[nn.Module] = [*getattr(network, "down_blocks", ()), *getattr(network, "up_blocks", ())]
    middle = getattr(network, "mid_block", None)
    return found if middle is None else [*found, middle]


def _buckets(gradients: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.numel()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
