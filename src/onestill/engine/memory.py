"""Whether a model and its pictures fit into memory: checked before loading, and explained where memory ran out.

The one place that recognises such errors, of torch and OpenVINO alike.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from onestill.checkpoint import ModelInfo, read_json, weights_file
from onestill.checkpoint.files import NETWORKS
from onestill.checkpoint.header import read_header
from onestill.errors import NotEnoughMemoryError, require

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The messages of libraries that run out of memory. First torch, CUDA, Triton and other vendors' GPUs; then cuBLAS,
# cuSOLVER, cuSPARSE, cuDNN and cuFFT, cuDNN from 9 on, and CUDA's and HIP's error codes; last torch on a CPU, C++,
# oneDNN.
MESSAGES = re.compile(
    r"out[ _]?of[ _]?(device[ _]|host[ _])?memory|(status|cufft)_alloc_failed|allocation_failed|errormemoryallocation"
    r"|can't allocate memory|not enough memory|bad_alloc|could not create a memory object",
    re.IGNORECASE,
)


def parameters(info: ModelInfo) -> int:
    """How many parameters a model has."""
    count = sum(_count(network.file, network.prefix) for network in info.component_files.values())
    for name in NETWORKS:
        if name in info.classes and name not in info.component_files:
            file = weights_file(info.path, name)
            parts = read_json(file.parent, file.name)["weight_map"].values() if file.suffix == ".json" else [file.name]
            count += sum(_count(file.parent / part) for part in set(parts))
    return count


def _count(file: Path, prefix: str = "") -> int:
    return sum(prod(at.shape) for name, at in read_header(file).tensors.items() if name.startswith(prefix))


def check_memory(info: ModelInfo, dtype: str) -> None:
    """Refuse a model whose weights are larger than the memory that this machine has left (known on Linux alone).

    Raises:
        NotEnoughMemoryError: the sentence says in which dtype it would fit.
    """
    count, left = parameters(info), _available()
    fits_halved = dtype == "float32" and left is not None and count * 2 < left
    smaller = "load it with dtype 'bfloat16'" if fits_halved else "choose a smaller model, or export it in int8"
    check_memory_left(info.name, count * BYTES[dtype], dtype, smaller)


def check_memory_left(name: str, needed: int, dtype: str, smaller: str) -> None:
    """Refuse weights of `needed` bytes where less memory is left; `smaller` says what to do then."""
    left = _available()
    if left is not None and needed >= left:
        raise NotEnoughMemoryError(
            f"The weights of '{name}' take {needed / 1e9:.1f} GB in {dtype} and {left / 1e9:.1f} GB of memory are "
            f"left; {smaller}."
        )


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that memory ran out. Libraries have no type for it, only messages."""
    return isinstance(error, MemoryError) or MESSAGES.search(str(error)) is not None


@contextmanager
def explain_oom(device: object, doing: str) -> Iterator[None]:
    """Turn an out-of-memory error in the body into one sentence, and free what the body had taken.

    Args:
        device: where the body computes; its text is its name.
        doing: what it does, as in "There is not enough memory on 'cuda' to draw 4 pictures".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, NotEnoughMemoryError) or not is_memory_error(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the frames would keep the tensors that memory is short of
    else:
        return
    if str(device).startswith("cuda"):
        require("torch", "torch").cuda.empty_cache()
    elsewhere = "" if str(device) == "cpu" else ", or on the device 'cpu'"
    raise NotEnoughMemoryError(
        f"There is not enough memory on '{device}' to {doing}; draw fewer or smaller pictures at once, or load the "
        f"model with a tiny VAE or in int8{elsewhere}."
    )
