"""What figures were measured on: processor, cores, memory, GPUs, versions. No host's name and no path."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path

from onestill.engine.device import automatic
from onestill.engine.gpus import TorchDevices, torch_devices
from onestill.errors import require

PACKAGES = {
    "base": "numpy openvino Pillow rich safetensors typer".split(),
    "serve": "fastapi python-multipart uvicorn websockets sqlalchemy alembic psycopg c2pa-python".split(),
    "torch": "accelerate diffusers peft torch transformers".split(),
    "train": ["tensorboard"],
}
# For figures.
DECISIVE = "onestill numpy openvino torch diffusers transformers tokenizers safetensors Pillow".split()
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

Facts = dict[str, object]


def machine() -> Facts:
    """All of it. Imports torch where that is installed, which takes seconds."""
    return {
        "cpu": cpu(),
        "memory_gib": _memory_gib(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "torch": torch(),
        "packages": versions(DECISIVE),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def machine_for_report() -> dict[str, str]:
    """Processor, cores that this process may use, memory and system, for a page."""
    found = cpu()
    facts = {"processor": str(found["name"]), "cores": str(found["cores"])}
    if memory := _memory_gib():
        facts["memory"] = f"{memory} GiB"
    return facts | {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}


def cpu() -> Facts:
    """The processor's name, the cores this process may use, and which fast instructions it has (on Linux alone)."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = set(facts.get("flags", "").split())
    return {
        "name": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": [flag for flag in CPU_FLAGS if flag in flags],
    }


def torch(sees: TorchDevices | None = None) -> Facts | None:
    """What torch sees, looked for where it is not given; None where torch is not installed. Imports it: seconds."""
    if sees is None:
        if util.find_spec("torch") is None:
            return None
        sees = torch_devices()
    return {
        "version": sees.version,
        "cuda": sees.cuda or None,
        "rocm": sees.rocm or None,
        "gpus": list(sees.gpus),
        "device": automatic(sees),  # that is taken unless another is asked for
        "trouble": sees.trouble or None,
        "threads": require("torch", "torch").get_num_threads(),
    }


def versions(names: Iterable[str] = DECISIVE) -> dict[str, str]:
    """The versions of those packages that are installed; by default those that decide figures."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _memory_gib() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
