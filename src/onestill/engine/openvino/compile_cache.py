"""Networks that OpenVINO compiled, kept between starts by its own cache: for SDXL, compiling takes twice as long.

A network is kept whole or not at all: it is written to a folder that gets its name when it is done. The weights are in
it, 2.6 GB of SDXL's UNet in int8, so only a model's own size is kept, and not without room on the disk.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino

from onestill import __version__
from onestill.checkpoint import cache_folder
from onestill.engine.memory import is_memory_error

__all__ = ["compile_kept", "network_key"]

MOST_BYTES = 12e9  # of all that is kept; the ones longest unused go first
ROOM = 3.0  # times a network's weights that the disk must have left
STALE_S = 3600.0  # after which a folder that is still unfinished is one that a killed process left
# OpenVINO's cache works in the locale "C", and two networks at once would leave the process there.
ONE_AT_ONCE = threading.Lock()


def compile_kept(core: Any, model: Any, config: Mapping[str, Any], source: Path) -> Any:
    """Compile a network, or read what an earlier start compiled of it.

    Args:
        core: OpenVINO's.
        model: as it is to be compiled, of static shapes.
        config: OpenVINO's options.
        source: the .xml file that the model was read from, beside its weights in a .bin.

    Raises:
        RuntimeError: as compiling does; a cache that cannot be used is no reason.
    """
    parent = cache_folder() / "openvino-sd"
    stored = source.with_suffix(".bin").stat()
    key = network_key(
        core,
        config,
        repr([(port.any_name, list(port.shape)) for port in model.inputs]),
        f"{stored.st_size} {stored.st_mtime_ns}",  # gigabytes, which `verify` has read already
        hashlib.sha256(source.read_bytes()).hexdigest(),
    )
    folder = parent / f"{source.stem}-{key}"
    if folder.is_dir():
        with suppress(OSError):
            os.utime(folder)
        return _compile(core, model, config, folder)
    unfinished = parent / f".{secrets.token_hex(8)}.part"
    try:
        unfinished.mkdir(parents=True)
        if shutil.disk_usage(unfinished).free > ROOM * stored.st_size:
            compiled = _compile(core, model, config, unfinished)
            with suppress(OSError):  # another process was first
                unfinished.rename(folder)
            _forget(parent)
            return compiled
    except OSError:
        pass
    except RuntimeError as error:
        if is_memory_error(error):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return core.compile_model(model, "CPU", config)


def _compile(core: Any, model: Any, config: Mapping[str, Any], folder: Path) -> Any:
    with ONE_AT_ONCE:
        return core.compile_model(model, "CPU", {**config, "CACHE_DIR": str(folder)})


def network_key(core: Any, config: Mapping[str, Any], *parts: str) -> str:
    """What tells a compiled network from others: OpenVINO, this package, the CPU, the options, and `parts`."""
    told = [
        str(openvino.__version__),
        __version__,  # of what rewrites the graph
        str(core.get_property("CPU", "FULL_DEVICE_NAME")),
        repr(sorted(config.items())),
        *parts,
    ]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


def _forget(parent: Path) -> None:
    """Remove what killed processes left, and the longest unused beyond `MOST_BYTES`."""
    with suppress(OSError):
        folders = sorted(parent.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
        total = 0
        for folder in folders:
            total += sum(file.stat().st_size for file in folder.iterdir())
            stale = folder.suffix == ".part" and time.time() - folder.stat().st_mtime > STALE_S
            if stale or (total > MOST_BYTES and folder.suffix != ".part"):
                shutil.rmtree(folder, ignore_errors=True)
