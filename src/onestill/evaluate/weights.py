"""Which weights a model draws with, as a short hash: figures of a model must not be taken for those of a later one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from onestill.checkpoint import ModelInfo

__all__ = ["fingerprint"]


def fingerprint(info: ModelInfo) -> str:
    """The hash of every weight that a model draws with: of its folder or file, and of what is put on top of it.

    Names of files count within a folder; where the folder lies, or what a single file is called, does not.
    """
    digest = hashlib.sha256()

    def add(name: str, path: Path) -> None:
        digest.update(name.encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)

    if info.path.is_dir():
        # A folder may hold the OpenVINO form alone; beside other weights it is made from them.
        for file in sorted(info.path.rglob("*.safetensors")) or sorted(info.path.rglob("*.bin")):
            add(str(file.relative_to(info.path)), file)
    else:
        add("", info.path)
    for role, network in sorted(info.networks.items()):
        if network.file != info.path:
            add(role, network.file)
    for lora in info.loras:
        add(f"lora {lora.scale}", lora.path)
    return digest.hexdigest()[:16]
