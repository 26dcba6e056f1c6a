"""Where torch computes: the one place that chooses a device and a default dtype.

`auto`, which is what None means too, takes the first GPU that torch has and can compute on, by CUDA (or ROCm, which
torch calls cuda as well), then by Apple's MPS, else the CPU. Importing this imports next to nothing, as every start of
the base install does; what looks for GPUs is imported by the functions that look.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from onestill.errors import OnestillError, near, require

if TYPE_CHECKING:
    from onestill.engine.gpus import Gpus, TorchDevices

AUTO = "auto"
NAMES = (AUTO, "cpu", "cuda", "mps", "xpu")
CALLED_CUDA = ("amd", "gpu", "hip", "nvidia", "rocm")  # what people type for what torch calls cuda


def is_auto(asked: str | None) -> bool:
    """Whether the choice of a device is left to us."""
    return _spelled(asked) == AUTO


def runs_on_cpu(asked: str | None) -> bool:
    """Whether an engine that runs on the CPU alone will do: that, or nothing, was asked for."""
    return _spelled(asked) in (AUTO, "cpu")


def checked_name(asked: str | None) -> str:
    """What was asked for in torch's spelling, or "auto". Imports torch only for names other than "auto" and "cpu".

    Raises:
        OnestillError: there is no such device anywhere.
    """
    name = _spelled(asked)
    kind = _kind(name)
    if name in (AUTO, "cpu"):
        return name
    if kind in ("cpu", "meta", *CALLED_CUDA) or not _is_known(name):
        like = " Did you mean 'cuda'?" if kind in CALLED_CUDA else near(name, NAMES)
        raise OnestillError(f"There is no device '{asked}'; choose from auto, cpu, cuda, cuda:1 and so on, mps.{like}")
    return name


def choose(asked: str | None = None) -> str:
    """The device to compute on, as torch names it. That torch can compute there was tried.

    Args:
        asked: "cpu", "cuda", "cuda:1", "mps" or another of torch's; None and "auto" leave the choice to this function.

    Raises:
        OnestillError: it cannot be had; the sentence says why and what to do.
        MissingExtraError: torch is not installed.
    """
    if checked_name(asked) == "cpu":
        return "cpu"
    from onestill.engine.gpus import find_gpus, torch_devices, trouble_on

    device = chosen(asked, torch_devices(), find_gpus, os.environ)
    if not is_auto(asked) and (trouble := trouble_on(device)):
        raise OnestillError(f"torch cannot compute on '{device}' here ({trouble}); {_else_cpu('')}.")
    return device


def chosen(asked: str | None, sees: TorchDevices, gpus: Callable[[], Gpus], environment: Mapping[str, str]) -> str:
    """As `choose`, from facts: what torch sees, what looks for GPUs if torch has none, and `os.environ`."""
    from onestill.engine.gpu_advice import why_no_cuda, why_no_mps

    name = checked_name(asked)
    if name == AUTO:
        return automatic(sees)
    if found := re.fullmatch(r"cuda(?::(0|[1-9]\d*))?", name):
        if not sees.gpus:
            why, mend = why_no_cuda(sees, gpus(), environment)
            raise OnestillError(f"There is no '{name}' here, as {why}; {_else_cpu(mend)}.")
        if found[1] and int(found[1]) >= len(sees.gpus):
            there = ", ".join(f"'cuda:{i}' ({gpu})" for i, gpu in enumerate(sees.gpus))
            raise OnestillError(f"There is no '{name}' here; choose from what torch sees: {there}.")
    elif name == "mps" and not sees.mps:
        why, mend = why_no_mps(sees, gpus())
        raise OnestillError(f"There is no 'mps' here, as {why}; {_else_cpu(mend)}.")
    return name


def automatic(sees: TorchDevices) -> str:
    """The device that `auto` takes."""
    if sees.trouble:
        return "cpu"
    return "cuda" if sees.gpus else "mps" if sees.mps else "cpu"


def is_cpu(asked: str | None) -> bool:
    """Whether `choose` would take a CPU. Computes nothing: several processes ask this, each before it knows its GPU."""
    if not is_auto(asked):
        return _kind(_spelled(asked)) == "cpu"
    from onestill.engine.gpus import torch_devices

    return automatic(torch_devices(tries=False)) == "cpu"


def explained(device: str) -> str:
    """One line on what `auto` chose and why, on this machine."""
    from onestill.engine.gpu_advice import explanation
    from onestill.engine.gpus import Gpus, find_gpus, torch_devices

    gpus = find_gpus() if device == "cpu" else Gpus()
    return explanation(device, torch_devices(), gpus, os.environ)


def default_dtype(device: str) -> str:
    """The dtype that torch computes in by default on a device: float32 on a CPU, float16 on GPUs.

    Of the two half-precision types, float16 rounds more finely, which few-step models that predict noise need.
    Autoencoders that leave its range stay in float32 or bfloat16; any other overflow is an error that names the fix.
    """
    return "float32" if _kind(device) == "cpu" else "float16"


def synchronize(device: str) -> None:
    """Wait until a device has finished its queued work, as timing needs."""
    kind = _kind(device)
    if kind == "cuda":
        require("torch", "torch").cuda.synchronize(device)
    elif kind != "cpu":
        getattr(require("torch", "torch"), kind).synchronize()


def peak_memory(device: str) -> float | None:
    """The peak of a GPU's memory that torch has used, in bytes; on Apple's GPU the present use. None on a CPU."""
    kind = _kind(device)
    if kind == "mps":
        return float(require("torch", "torch").mps.driver_allocated_memory())
    if kind in ("cuda", "xpu"):
        return float(getattr(require("torch", "torch"), kind).max_memory_allocated(device))
    return None


def _spelled(asked: str | None) -> str:
    name = AUTO if asked is None else asked.strip().lower()
    return "cpu" if name == "cpu:0" else name


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _is_known(name: str) -> bool:
    if importlib.util.find_spec("torch") is None:  # which alone knows all
        return _kind(name) in NAMES
    try:
        require("torch", "torch").device(name)
    except RuntimeError:
        return False
    return True


def _else_cpu(mend: str) -> str:
    return f"{mend}, or choose 'cpu'" if mend else "choose 'cpu', or leave the device out"
