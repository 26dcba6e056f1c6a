"""A small program that stands for `nvidia-smi` on PATH, and says what that says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

QUERY = """
==============NVSMI LOG==============

Timestamp                                 : Sat Nov 28 12:00:00 2026
Driver Version                            : {driver}
CUDA Version                              : {cuda}

Attached GPUs                             : {count}
"""
GPU = """GPU 00000000:{at:02d}:00.0
    Product Name                          : {name}
    Product Brand                         : GeForce
    Product Architecture                  : Ada Lovelace
    FB Memory Usage
        Total                             : 8188 MiB
"""


def says(names: list[str], cuda: str = "13.0", driver: str = "580.65.06") -> str:
    """What `nvidia-smi -q` prints of these GPUs, shortened."""
    gpus = "".join(GPU.format(at=at, name=name) for at, name in enumerate(names, 1))
    return QUERY.format(driver=driver, cuda=cuda, count=len(names)) + gpus


def put_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, printed: str, status: int = 0) -> None:
    """Make the program, which prints that whatever it is asked, and put its folder first in PATH."""
    folder.mkdir()
    (folder / "printed").write_text(printed)
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncat "{folder}/printed"\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def no_nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A PATH on which there is nothing."""
    monkeypatch.setenv("PATH", str(folder))
