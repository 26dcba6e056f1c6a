"""Which weights a model draws with, as a short hash: figures of a model must not be taken for those of a later one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from onestill.checkpoint import ModelInfo


def fingerprint(model: ModelInfo | Path) -> str:
    """The hash of every weight that a model draws with: of its folder or file, and of what is put on top of it.

    A path is a folder of weights that need not be a whole model's, or a single file.

    Names of files count within a folder; where the folder lies, or what a single file is called, does not.
    """
    digest = hashlib.sha256()

    def add(name: str, path: Path) -> None:
        digest.update(name.encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)

    path = model if isinstance(model, Path) else model.path
    if path.is_dir():
        # A folder may hold the OpenVINO form alone; beside other weights it is made from them.
        for file in sorted(path.rglob("*.safetensors")) or sorted(path.rglob("*.bin")):
            add(str(file.relative_to(path)), file)
    else:
        add("", path)
    if isinstance(model, ModelInfo):
        for role, network in sorted(model.component_files.items()):
            if network.file != path:
                add(role, network.file)
        for lora in model.loras:
            add(f"lora {lora.scale}", lora.path)
    return digest.hexdigest()[:16]
