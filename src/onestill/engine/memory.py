"""Whether a model and its pictures fit into memory, said before or after it was tried. `[torch]`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

from onestill.checkpoint import ModelInfo, read_json, weights_file
from onestill.checkpoint.files import NETWORKS
from onestill.checkpoint.header import read_header
from onestill.errors import NotEnoughMemoryError

__all__ = ["check_memory", "memory_told", "parameters"]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_MESSAGES = ("can't allocate memory", "not enough memory", "bad_alloc", "could not create a memory object")


def parameters(info: ModelInfo) -> int:
    """How many numbers a model's weights are."""
    count = sum(_numbers(network.file, network.prefix) for network in info.networks.values())
    for name in NETWORKS:
        if name in info.classes and name not in info.networks:
            file = weights_file(info.path, name)
            parts = read_json(file.parent, file.name)["weight_map"].values() if file.suffix == ".json" else [file.name]
            count += sum(_numbers(file.parent / part) for part in set(parts))
    return count


def _numbers(file: Path, prefix: str = "") -> int:
    return sum(prod(at.shape) for name, at in read_header(file).tensors.items() if name.startswith(prefix))


def check_memory(info: ModelInfo, dtype: str) -> None:
    """Refuse a model whose weights are larger than the memory that this machine has left (Linux tells).

    Raises:
        NotEnoughMemoryError: the sentence says in what type it would fit.
    """
    count, left = parameters(info), _available()
    if left is None or count * BYTES[dtype] < left:
        return
    smaller = "dtype 'bfloat16'" if dtype == "float32" and count * 2 < left else "quantize 'int8', or a smaller model"
    raise NotEnoughMemoryError(
        f"The weights of '{info.name}' take {count * BYTES[dtype] / 1e9:.1f} GB in {dtype} and {left / 1e9:.1f} GB of "
        f"memory are left; load it with {smaller}."
    )


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


@contextmanager
def memory_told(device: torch.device, doing: str) -> Iterator[None]:
    """Turn running out of memory in the body into one sentence, and give back what was taken.

    Args:
        device: where the body computes.
        doing: what it does, as in "There is not enough memory on 'cuda' to draw 4 pictures".
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        found: BaseException | None = error
    except RuntimeError as error:  # what torch raises on a CPU
        if not any(message in str(error).lower() for message in CPU_MESSAGES):
            raise
        found = error
    else:
        return
    # Outside the handlers and without the cause: its frames would keep the tensors that memory is short of.
    del found
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise NotEnoughMemoryError(
        f"There is not enough memory on '{device}' to {doing}; draw fewer or smaller pictures at once, or load the "
        "model with a tiny VAE or in int8."
    )
