"""What is said to the owner of a GPU that torch does not use: facts in, sentences out."""

from __future__ import annotations

import re

import pytest

from onestill.engine.gpu_advice import advice, explanation, why_no_cuda, why_no_mps
from onestill.engine.gpus import Gpus, TorchDevices

LINUX, WINDOWS, MAC = "Linux x86_64", "Windows AMD64", "Darwin arm64"
CPU_BUILD = TorchDevices("2.13.0+cpu")
CUDA_BUILD = TorchDevices("2.13.0+cu130", cuda="13.0")
ROCM_BUILD = TorchDevices("2.13.0+rocm7", rocm="7.0")
FULL = "CUDA out of memory. Tried to allocate 2.00 MiB"
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
RTX = Gpus(LINUX, ("NVIDIA GeForce RTX 4070",), "580.65.06", "13.0")
OLD_DRIVER = Gpus(LINUX, ("NVIDIA GeForce RTX 4070",), "550.54.15", "12.4")
ON_WINDOWS = Gpus(WINDOWS, ("NVIDIA GeForce RTX 4070",), "580.65.06", "13.0")
UNREACHED = Gpus(LINUX, ("NVIDIA H200",), "580.65.06", out_of_reach=True)
BROKEN = Gpus(LINUX, ("NVIDIA H200",), "580.65.06", problem="Failed to initialize NVML")
AMD, APPLE, NONE = Gpus(LINUX, amd=True), Gpus(MAC), Gpus(LINUX)
REINSTALL = "`pip uninstall -y torch && pip install torch`"
SELECTOR = "the selector on PyTorch's page 'Get Started'"

UNUSED = [
    (CPU_BUILD, RTX, {}, ["built without CUDA, while the NVIDIA GeForce RTX 4070 is here", "CUDA 13.0", REINSTALL]),
    (CPU_BUILD, OLD_DRIVER, {}, ["driver runs CUDA 12.4", "update the driver to one for CUDA 13", REINSTALL, SELECTOR]),
    (CPU_BUILD, ON_WINDOWS, {}, ["is built without CUDA", "`pip uninstall -y torch`", SELECTOR, "for CUDA"]),
    (CPU_BUILD, AMD, {}, ["built without ROCm, while an AMD GPU is here", SELECTOR, "for ROCm"]),
    (CUDA_BUILD, AMD, {}, ["built for NVIDIA's GPUs, while an AMD GPU is here", "for ROCm"]),
    (CUDA_BUILD, OLD_DRIVER, {}, ["is built for CUDA 13.0", "runs CUDA 12.4 at most", "update NVIDIA's driver"]),
    (CUDA_BUILD, RTX, {"CUDA_VISIBLE_DEVICES": "-1"}, ["CUDA_VISIBLE_DEVICES is '-1'", "unset CUDA_VISIBLE_DEVICES"]),
    (CUDA_BUILD, UNREACHED, {}, ["gives this process no GPU", "`--gpus all`"]),
    (CUDA_BUILD, BROKEN, {}, ["does not answer (Failed to initialize NVML)", "restart the machine"]),
    (CUDA_BUILD, RTX, {}, ["does not see the NVIDIA GeForce RTX 4070", "restart the machine"]),
    (TorchDevices("2", cuda="13", trouble="Error 804"), RTX, {}, ["and says: Error 804"]),
    (TorchDevices("2", cuda="13", gpus=("GTX 1080",), trouble=NO_KERNEL), RTX, {}, ["GTX 1080", NO_KERNEL, SELECTOR]),
    (TorchDevices("2", cuda="13", gpus=("RTX",), trouble=FULL), RTX, {}, ["cannot compute on the RTX", "its memory"]),
    (ROCM_BUILD, AMD, {}, ["does not see the AMD GPU", "/dev/kfd"]),
    (CPU_BUILD, APPLE, {}, ["does not see Apple's GPU", "update macOS and torch"]),
    (TorchDevices("2", mps=True, trouble="MPS backend out of memory"), APPLE, {}, ["Apple's GPU (MPS backend"]),
]


@pytest.mark.parametrize(("sees", "gpus", "environment", "told"), UNUSED)
def test_an_unused_gpu_is_told_of_in_one_sentence(
    sees: TorchDevices, gpus: Gpus, environment: dict[str, str], told: list[str]
) -> None:
    (sentence,) = advice(sees, gpus, environment)
    # On the line of a command, a GPU that this process was not given is none.
    line = explanation("cpu", sees, gpus, environment) if not gpus.out_of_reach else sentence
    for text in (sentence, line):
        for words in told:
            assert words in text
        assert not re.search(r"https?:|\.org|\.com|--index-url", text), "no registry is named"
        assert "\n" not in text
    assert sentence.endswith(".")


def test_who_needs_no_advice_gets_none() -> None:
    assert advice(CPU_BUILD, NONE, {}) == []
    assert advice(None, NONE, {}) == []
    assert advice(TorchDevices("2", cuda="13.0", gpus=("NVIDIA H200",)), RTX, {}) == []
    assert advice(TorchDevices("2", mps=True), APPLE, {}) == []


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        (RTX, "RTX 4070 that is here: run `pip install 'onestill[torch]'`."),
        (OLD_DRIVER, "`, once NVIDIA's driver is updated from CUDA 12.4 to 13"),
        (ON_WINDOWS, f"`, and then torch's build for CUDA, by the command that {SELECTOR} gives."),
        (APPLE, "Apple's GPU that is here: run `pip install 'onestill[torch]'`."),
    ],
)
def test_without_torch_it_is_told_what_torch_would_bring(gpus: Gpus, told: str) -> None:
    (sentence,) = advice(None, gpus, {})
    assert told in sentence


def test_what_auto_chose_is_one_line() -> None:
    assert explanation("cuda", TorchDevices("2", gpus=("NVIDIA H200",)), NONE, {}) == (
        "torch computes on cuda (NVIDIA H200)"
    )
    assert explanation("mps", TorchDevices("2", mps=True), NONE, {}) == "torch computes on mps"
    assert explanation("cpu", CPU_BUILD, NONE, {}) == "torch computes on the CPU, as it sees no GPU"


def test_where_there_is_no_gpu_there_is_nothing_to_mend() -> None:
    assert why_no_cuda(CPU_BUILD, NONE, {})[1] == ""
    assert why_no_cuda(CUDA_BUILD, NONE, {"CUDA_VISIBLE_DEVICES": "0"}) == (
        "no GPU of NVIDIA's or AMD's, and no driver of theirs, is to be seen",
        "",
    )
    assert why_no_cuda(CPU_BUILD, APPLE, {}) == ("torch calls Apple's GPU 'mps'", "choose that")
    assert why_no_mps(CUDA_BUILD, NONE) == ("that is the GPU of a Mac with Apple silicon", "")
