"""The cache of compiled networks, which later starts read in place of compiling.

A small network is one file, a blob, which is mapped into memory: the fastest start, but writing it takes the network's
memory once more. A large one is written by OpenVINO's own cache while it compiles, into a folder that gets its name
when it is whole. The weights are in it, 2.6 GB of SDXL's UNet in int8, so it needs room on the disk.

A cache is only a speed-up: one that is damaged or cannot be written never stops anyone from drawing.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino

import numpy as np

from onestill import __version__
from onestill.checkpoint import cache_folder, written_whole
from onestill.engine.memory import is_memory_error

MOST_NETWORKS = 24  # in a folder of the cache, all models together; the ones longest unused go first
MOST_BYTES = 12e9  # likewise
ROOM = 3.0  # times a large network's weights that the disk must have left
STALE_S = 3600.0  # after which something that is still unfinished is what a killed process left
BLOB_END = b"onestill blob 1\n"  # a blob without it was not written to its end
# OpenVINO's own cache works in the locale "C", and two networks at once would leave the process there.
ONE_AT_ONCE = threading.Lock()


def network_key(core: Any, options: Mapping[str, Any], *parts: str) -> str:
    """What tells a compiled network from others: OpenVINO, this package, the CPU, the options, and `parts`."""
    facts = [
        str(openvino.__version__),
        __version__,  # of what rewrites the graph
        str(core.get_property("CPU", "FULL_DEVICE_NAME")),
        repr(sorted(options.items())),
        *parts,
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def compile_to_blob(
    core: Any, name: str, options: Mapping[str, Any], read: Callable[[], tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Compile a small network, or map what an earlier start compiled of it.

    Args:
        core: OpenVINO's.
        name: of the file, with the network's key.
        options: OpenVINO's.
        read: reads the model and the memory that it points into; not called where the cache has the network.

    Returns:
        The compiled network, and the memory that it points into, which must outlive it.

    Raises:
        RuntimeError: as reading and compiling do.
    """
    path = cache_folder() / "openvino" / f"{name}.blob"
    with suppress(OSError, ValueError, RuntimeError):
        blob = np.memmap(path, dtype=np.uint8, mode="c")  # half of it is a table of tokens, of which few are read
        if blob[-len(BLOB_END) :].tobytes() == BLOB_END:
            path.touch()  # the ones longest unused go first
            tensor = openvino.Tensor(blob[: -len(BLOB_END)], shared_memory=True)
            return core.import_model(tensor, "CPU", options), blob
    model, memory = read()
    compiled = core.compile_model(model, "CPU", options)
    with suppress(OSError, RuntimeError):
        with written_whole(path) as unfinished:
            unfinished.write_bytes(compiled.export_model().getvalue() + BLOB_END)
        _remove_oldest(path.parent)
    return compiled, memory


def compile_into_folder(core: Any, name: str, options: Mapping[str, Any], model: Any, size: int) -> Any:
    """Compile a large network, or read what an earlier start compiled of it.

    Args:
        core: OpenVINO's.
        name: of the folder, with the network's key.
        options: OpenVINO's.
        model: as it is to be compiled, of static shapes.
        size: bytes of its weights.

    Raises:
        RuntimeError: as compiling does.
    """
    parent = cache_folder() / "openvino-sd"
    folder = parent / name
    if folder.is_dir():
        with suppress(OSError):
            os.utime(folder)
        return _compile_with_cache(core, model, options, folder)
    unfinished = parent / f".{secrets.token_hex(8)}.part"
    try:
        unfinished.mkdir(parents=True)
        if shutil.disk_usage(unfinished).free > ROOM * size:
            compiled = _compile_with_cache(core, model, options, unfinished)
            with suppress(OSError):  # another process was first
                unfinished.rename(folder)
            _remove_oldest(parent)
            return compiled
    except OSError:
        pass
    except RuntimeError as error:
        if is_memory_error(error):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return core.compile_model(model, "CPU", options)


def _compile_with_cache(core: Any, model: Any, options: Mapping[str, Any], folder: Path) -> Any:
    with ONE_AT_ONCE:
        return core.compile_model(model, "CPU", {**options, "CACHE_DIR": str(folder)})


def _remove_oldest(parent: Path) -> None:
    """Remove what killed processes left, and the networks longest unused beyond what a folder holds."""
    with suppress(OSError):
        entries = sorted(parent.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        networks, total = 0, 0
        for entry in entries:
            total += sum(file.stat().st_size for file in (entry.iterdir() if entry.is_dir() else [entry]))
            if entry.suffix == ".part":
                is_old = time.time() - entry.stat().st_mtime > STALE_S
            else:
                networks += 1
                is_old = networks > MOST_NETWORKS or total > MOST_BYTES
            if is_old and entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif is_old:
                entry.unlink()
