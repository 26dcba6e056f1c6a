"""What the machine is, and the two rates that bound everything on it: arithmetic, and reading memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.quarter.steps import Run
from onestill.bench.machine import machine, versions
from onestill.bench.roofline import matrix_tflops

__all__ = ["environment"]

COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**26}
PACKAGES = ("triton", "torchao", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "accelerate", "peft", "resvg", "pyarrow")


def environment(run: Run, seconds: float, note: Callable[..., None]) -> Mapping[str, Any]:
    """Facts of the machine, rates measured on it."""
    del seconds
    note(machine=machine(), packages=versions(PACKAGES), nvidia_smi=said(["nvidia-smi"]))
    if run.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        backends: Any = torch.backends
        note(
            gpu={
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gb": round(properties.total_memory / 1e9, 1),
                "multiprocessors": properties.multi_processor_count,
                "cudnn": backends.cudnn.version(),
                "tf32": {"matmul": backends.cuda.matmul.allow_tf32, "cudnn": backends.cudnn.allow_tf32},
            }
        )
    types = ("bfloat16", "float16", "float32") if run.on_gpu else ("float32",)
    rates = {dtype: round(matrix_tflops(run.device, dtype), 3) for dtype in types}
    run.shared["copy_gb_per_s"] = copied = round(copy_gb_per_s(run.device), 1)
    return {"matrix_tflops": rates, "copy_gb_per_s": copied}


def copy_gb_per_s(device: str) -> float:
    """Gigabytes a second of a large copy on the device, read and written ones counted; the best of some."""
    source = torch.ones(COPY_BYTES[torch.device(device).type] // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / best / 1e9


def said(command: list[str]) -> str | None:
    """What a command prints, None where there is no such command."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout or done.stderr
