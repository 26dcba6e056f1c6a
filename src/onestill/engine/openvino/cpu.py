"""What the CPU computes fastest in, as far as OpenVINO, the environment and the operating system tell."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

# oneDNN's names for sets of instructions that multiply no int8, or no bfloat16.
WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX512_CORE")
WITHOUT_BFLOAT16 = (*WITHOUT_VNNI, "AVX2_VNNI", "AVX512_CORE_VNNI")


def fastest_float(core: Any) -> str:
    """The faster of "float32" and "bfloat16", which some CPUs have instructions for."""
    has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bfloat16" if has_bfloat16 and _onednn_limit() not in WITHOUT_BFLOAT16 else "float32"


def multiplies_int8(has_bfloat16: bool) -> bool:
    """Whether int8 pays: OpenVINO names it on any CPU, but without VNNI it gains little, and on Arm it loses.

    An x86 CPU with bfloat16 has VNNI too. Of the others only Linux says; elsewhere the answer is no.
    """
    return _is_x86() and not lacks_vnni() and (has_bfloat16 or "vnni" in _cpu_flags())


def lacks_vnni() -> bool:
    """Whether this is an x86 CPU that is known to be without VNNI. int8 draws wrong pictures there.

    OpenVINO's kernels then add products of bytes in 16 bits, which overflow: Stable Diffusion came out 28 levels of
    255 off on AVX2.
    """
    return _is_x86() and (_onednn_limit() in WITHOUT_VNNI or "vnni" not in (_cpu_flags() or "vnni"))


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _cpu_flags() -> str:
    """What Linux says of the CPU; "" elsewhere."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return ""


def _onednn_limit() -> str:
    """The instructions that the environment limits oneDNN to, "" without a limit. OpenVINO asks the CPU alone."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
