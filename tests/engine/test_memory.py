"""What is said, and given back, when memory runs out."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from onestill.engine.memory import explain_oom, is_memory_error
from onestill.errors import NotEnoughMemoryError


def test_what_did_not_fit_is_given_back_while_the_error_is_handled() -> None:
    kept: list[weakref.ref[Any]] = []

    def draw() -> None:
        large = np.zeros(1000)
        kept.append(weakref.ref(large))
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(NotEnoughMemoryError, match="to draw; draw fewer") as caught, explain_oom("cpu", "draw"):
        draw()
    assert caught.value.__context__ is not None  # whose frames are alive, with nothing in them
    assert kept[0]() is None


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda",
        "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "HIP error: hipErrorOutOfMemory",
        "MPS backend out of memory (MPS allocated: 8.00 GB)",
        "UR error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
        "level_zero backend failed with error: UR_RESULT_ERROR_OUT_OF_HOST_MEMORY",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes.",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "std::bad_alloc",
        "could not create a memory object",
    ],
)
def test_every_library_is_understood(message: str) -> None:
    with pytest.raises(NotEnoughMemoryError, match="draw fewer"), explain_oom("cpu", "draw"):
        raise RuntimeError(message)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "CUDA error: an illegal memory access was encountered",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "out of resource: shared memory, Required: 264224, Hardware limit: 232448.",
        "expected memory format channels_last",
    ],
)
def test_other_troubles_with_memory_are_not_taken_for_it(message: str) -> None:
    assert not is_memory_error(RuntimeError(message))


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explain_oom("cpu", "draw"):
        raise RuntimeError("shapes differ")
