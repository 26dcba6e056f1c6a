"""A GPU that is pretended: tensors have its device, shapes and types, and nothing is computed or allocated.

`recording` runs what is to become a CUDA graph on it, and fails on what a graph cannot hold. A graph replays kernels on
fixed memory: reading a number back, copying between host and device, or a shape that depends on numbers ends its
recording with an error or, worse, stays what it was then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRETENDED = FakeTensorMode()  # one, as tensors of two do not mix
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors made in the body on "cuda" are pretended."""
    # Libraries may leave checks out while a stream is recorded, as it is here.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with ExitStack() as modes:
        modes.enter_context(PRETENDED)
        # As without a GPU: a number is made on the CPU and copied, whether or not there is one.
        modes.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        modes.enter_context(torch.no_grad())  # inference mode would hide what composite operations are made of
        if not torch.backends.cuda.is_built():
            modes.enter_context(Bindings())
        yield


def moved(module: nn.Module) -> nn.Module:
    """A module with its weights and buffers pretended, on the pretended GPU, in place."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = nn.Parameter(new, requires_grad=False) if tensors is part._parameters else new
    return module


class Unrecordable(AssertionError):
    """An operation that a CUDA graph cannot hold."""


class Recording(TorchDispatchMode):
    """Raises Unrecordable at the first operation that a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not all(one.is_cuda for one in tensors_of((args, kwargs))):
            raise Unrecordable(f"{func} takes a tensor of the CPU")
        if func.overloadpacket in INDEXING:
            if any(one.dtype in (torch.bool, torch.uint8) for one in tensors_of(args[1])):
                raise Unrecordable(f"{func} takes a condition for an index")
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise Unrecordable(f"{func} reads numbers back")
        found = func(*args, **kwargs)
        if not all(one.is_cuda for one in tensors_of(found)):
            raise Unrecordable(f"{func} makes a tensor of the CPU")
        return found


def tensors_of(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


class Bindings(TorchFunctionMode):
    """Some methods of tensors by torch's operations: their own code asks for a driver that a build for CPUs has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return BINDINGS.get(func, func)(*args, **(kwargs or {}))


def taken(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]`."""
    view, indices = _viewed(tensor, index)
    return view if not indices else torch.ops.aten.index.Tensor(view, indices)


def put(tensor: Tensor, index: Any, value: Any) -> None:
    """`tensor[index] = value`."""
    view, indices = _viewed(tensor, index)
    if indices:
        torch.ops.aten.index_put_.default(
            view, indices, torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
        )
    elif isinstance(value, Tensor):
        torch.ops.aten.copy_.default(view, value)
    else:
        view.fill_(value)


def _viewed(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What integers, slices, None and an ellipsis make of a tensor; and the tensors that index it further, by axis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    spent = sum(1 if not isinstance(part, Tensor) or part.dtype != torch.bool else part.ndim for part in parts)
    spent -= sum(part is None or part is Ellipsis for part in parts)
    if Ellipsis not in [part for part in parts if not isinstance(part, Tensor)]:
        parts.append(Ellipsis)
    axis, found = 0, tensor
    indices: list[Tensor | None] = []
    for part in parts:
        if part is Ellipsis:
            skipped = tensor.ndim - spent
            axis += skipped
            indices += [None] * skipped
        elif part is None:
            found = found.unsqueeze(axis)
        elif isinstance(part, slice):
            found = torch.ops.aten.slice.Tensor(found, axis, part.start, part.stop, part.step or 1)
        elif isinstance(part, int):
            found = found.select(axis, part)
            continue
        else:
            numbers = part if isinstance(part, Tensor) else torch.tensor(part, device=tensor.device)
            indices.append(numbers)
            axis += numbers.ndim if numbers.dtype == torch.bool else 1
            continue
        if part is not Ellipsis:
            axis += 1
            indices.append(None)
    return found, indices if any(one is not None for one in indices) else []


BINDINGS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: taken,
    Tensor.__setitem__: put,
    Tensor.__float__: Tensor.item,
    Tensor.__int__: Tensor.item,
    Tensor.contiguous: torch.ops.aten.contiguous.default,
    Tensor.copy_: torch.ops.aten.copy_.default,
    Tensor.nonzero: torch.ops.aten.nonzero.default,
}
