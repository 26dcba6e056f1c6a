"""Why torch computes on no GPU, and what its owner can do about it, in sentences made from facts.

Commands and pages are named so that no registry is: which one pip asks is its owner's choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from onestill.engine.gpus import Gpus, TorchDevices

HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
DEFAULT_BUILD = "Linux x86_64"  # the platform on which pip takes a build for CUDA by default
DEFAULT_CUDA = 13  # what that build, of torch 2.11 and later, is for
SELECTOR = "the selector on PyTorch's page 'Get Started'"


def explanation(device: str, sees: TorchDevices, gpus: Gpus, environment: Mapping[str, str]) -> str:
    """One line on what `auto` chose, `device`, and why; only the CPU's line needs `gpus`."""
    if device != "cpu":
        return f"torch computes on {device}{f' ({sees.gpus[0]})' if sees.gpus else ''}"
    if sees.gpus or gpus.nvidia_in_words or gpus.amd:
        why, mend = why_no_cuda(sees, gpus, environment)
    elif sees.mps or gpus.apple:
        why, mend = why_no_mps(sees, gpus)
    else:
        return "torch computes on the CPU, as it sees no GPU"
    return f"torch computes on the CPU: {why}{f'; {mend}' if mend else ''}"


def advice(sees: TorchDevices | None, gpus: Gpus, environment: Mapping[str, str]) -> list[str]:
    """What the owner of a GPU that torch does not use can do, in sentences; `sees` is None where torch is missing."""
    if sees is None:
        return _advice_without_torch(gpus)
    if (sees.gpus or sees.mps) and not sees.trouble:
        return []
    if sees.gpus or gpus.nvidia or gpus.driver or gpus.problem or gpus.amd:
        why, mend = why_no_cuda(sees, gpus, environment)
    elif gpus.apple:
        why, mend = why_no_mps(sees, gpus)
    else:
        return []
    return [f"The GPU is not used, as {why}{f': {mend}' if mend else ''}."]


def _advice_without_torch(gpus: Gpus) -> list[str]:
    name = gpus.nvidia_in_words or ("Apple's GPU" if gpus.apple else "")
    if not name:
        return []
    after = ""
    if not gpus.apple and gpus.platform != DEFAULT_BUILD:
        after = f", and then torch's build for CUDA, by the command that {SELECTOR} gives"
    elif _is_too_old(gpus):
        after = f", once NVIDIA's driver is updated from CUDA {gpus.cuda} to {DEFAULT_CUDA}, which torch is built for"
    return [
        f"With torch, which is not installed, real checkpoints such as SDXL Turbo draw on the {name} that is here: "
        f"run `pip install 'onestill[torch]'`{after}."
    ]


def why_no_cuda(sees: TorchDevices, gpus: Gpus, environment: Mapping[str, str]) -> tuple[str, str]:
    """Why torch computes on no GPU by CUDA or ROCm, and what mends that: two parts of a sentence, the latter "" where
    there is nothing to mend.
    """
    torch, here = f"torch {sees.version}", gpus.nvidia_in_words
    if not sees.cuda and not sees.rocm:
        return _why_without_cuda(torch, gpus)
    if sees.gpus:
        full = "memory" in sees.trouble.lower()
        mend = "end what else fills its memory" if full else f"take a build of torch for it from {SELECTOR}"
        return f"{torch} cannot compute on the {sees.gpus[0]} ({sees.trouble})", mend
    for name in HIDING:
        if name in environment and (here or gpus.amd):
            return f"{name} is '{environment[name]}', which leaves torch no GPU", f"unset {name}"
    if gpus.problem:
        return f"NVIDIA's driver does not answer ({gpus.problem})", "restart the machine, or install the driver again"
    if gpus.out_of_reach:
        return "NVIDIA's driver is loaded but gives this process no GPU", "start the container with `--gpus all`"
    if here and gpus.cuda and sees.cuda and _major(gpus.cuda) < _major(sees.cuda):
        return (
            f"{torch} is built for CUDA {sees.cuda}, and the driver of the {here} runs CUDA {gpus.cuda} at most",
            f"update NVIDIA's driver, or take the build for CUDA {gpus.cuda} or older from {SELECTOR}",
        )
    if here:
        said = f", and says: {sees.trouble}" if sees.trouble else ""
        return f"{torch} does not see the {here}{said}", "restart the machine, or update NVIDIA's driver"
    if gpus.amd and sees.rocm:
        return f"{torch} does not see the AMD GPU", "give this user the right to /dev/kfd (the group 'render')"
    if gpus.amd:
        return f"{torch} is built for NVIDIA's GPUs, while an AMD GPU is here", _install("ROCm", gpus)
    return "no GPU of NVIDIA's or AMD's, and no driver of theirs, is to be seen", ""


def _why_without_cuda(torch: str, gpus: Gpus) -> tuple[str, str]:
    if here := gpus.nvidia_in_words:
        runs = f", whose driver runs CUDA {gpus.cuda}" if gpus.cuda else ""
        why = f"{torch} is built without CUDA, while the {here} is here{runs}"
        if _is_too_old(gpus):
            older = f"take the build for CUDA {gpus.cuda} or older from {SELECTOR}"
            return why, f"update the driver to one for CUDA {DEFAULT_CUDA} and {_install('CUDA', gpus)}, or {older}"
        return why, _install("CUDA", gpus)
    if gpus.amd:
        return f"{torch} is built without ROCm, while an AMD GPU is here", _install("ROCm", gpus)
    if gpus.apple:
        return "torch calls Apple's GPU 'mps'", "choose that"
    return f"{torch} is built without CUDA, and no GPU of NVIDIA's or AMD's is to be seen", ""


def why_no_mps(sees: TorchDevices, gpus: Gpus) -> tuple[str, str]:
    """As `why_no_cuda`, of Apple's GPU."""
    if not gpus.apple:
        return "that is the GPU of a Mac with Apple silicon", "choose 'cuda'" if sees.gpus else ""
    if sees.mps:
        return f"torch {sees.version} cannot compute on Apple's GPU ({sees.trouble})", ""
    return f"torch {sees.version} does not see Apple's GPU", "update macOS and torch"


def _install(kind: str, gpus: Gpus) -> str:
    """How a build of torch for CUDA or ROCm comes here."""
    if kind == "CUDA" and gpus.platform == DEFAULT_BUILD:
        return "run `pip uninstall -y torch && pip install torch`"
    return f"run `pip uninstall -y torch` and then the command that {SELECTOR} gives for {kind}"


def _is_too_old(gpus: Gpus) -> bool:
    """Whether NVIDIA's driver is too old for the build that pip takes."""
    return gpus.platform == DEFAULT_BUILD and bool(gpus.cuda) and _major(gpus.cuda) < DEFAULT_CUDA


def _major(version: str) -> int:
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0
