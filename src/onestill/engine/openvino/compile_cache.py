"""The cache of compiled networks, which later starts read in place of compiling.

A small network is one file, a blob, which is mapped into memory: the fastest start, but writing it takes the network's
memory once more. A large one is written by OpenVINO's own cache while it compiles, into a folder that gets its name
when it is whole. The weights are in it, 2.6 GB of SDXL's UNet in int8, so it needs room on the disk.

A cache is only a speed-up: one that is damaged or cannot be written never stops anyone from drawing. A blob ends in a
seal, which is checked as it is mapped. Of a large network, whose reading would take a second, `sums.json` has the CRC
of each file with its size and times, and only what has been touched since is read. What is wrong is compiled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino

import numpy as np

from onestill import __version__
from onestill.checkpoint import cache_folder, seal, unsealed, written_whole
from onestill.engine.memory import is_memory_error

MOST_NETWORKS = 24  # in a folder of the cache, all models together; the ones longest unused go first
MOST_BYTES = 12e9  # likewise
ROOM = 3.0  # times a large network's weights that the disk must have left
STALE_S = 3600.0  # after which something that is still unfinished is what a killed process left
BLOBS, FOLDERS = "openvino", "openvino-sd"  # in the folder of caches
SUMS = "sums.json"
# OpenVINO's own cache works in the locale "C", and two networks at once would leave the process there.
ONE_AT_ONCE = threading.Lock()


def network_key(core: Any, options: Mapping[str, Any], *parts: str) -> str:
    """What tells a compiled network from others: OpenVINO, this package, the CPU, the options, and `parts`."""
    facts = [
        str(openvino.__version__),
        f"{__version__} {SUMS}",  # of what rewrites the graph, and how files are checked
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
    path = cache_folder() / BLOBS / f"{name}.blob"
    with suppress(OSError, RuntimeError):
        if path.stat().st_size and (content := unsealed(blob := _mapped(path))) is not None:
            path.touch()  # the ones longest unused go first
            tensor = openvino.Tensor(np.frombuffer(content, np.uint8), shared_memory=True)
            return core.import_model(tensor, "CPU", options), blob
        _say_damaged(path)
    model, memory = read()
    compiled = core.compile_model(model, "CPU", options)
    with suppress(OSError, RuntimeError):
        with written_whole(path) as unfinished:
            content = compiled.export_model().getvalue()
            unfinished.write_bytes(content + seal(content))
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
    parent = cache_folder() / FOLDERS
    folder = parent / name
    if folder.is_dir() and _is_right(folder):
        with suppress(OSError):
            os.utime(folder)
        return _compile_with_cache(core, model, options, folder)
    if folder.is_dir():
        _say_damaged(folder)
        shutil.rmtree(folder, ignore_errors=True)
    unfinished = parent / f".{secrets.token_hex(8)}.part"
    try:
        unfinished.mkdir(parents=True)
        if shutil.disk_usage(unfinished).free > ROOM * size:
            compiled = _compile_with_cache(core, model, options, unfinished)
            _write_sums(unfinished, {file.name: [_crc(file), *_touched(file)] for file in unfinished.iterdir()})
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


def damaged() -> tuple[int, list[Path]]:
    """Read all compiled code that is cached, torch's too: how many networks it is of, and what is damaged of it."""
    files, ours, folders = (sorted((cache_folder() / name).glob("[!.]*")) for name in ("torch", BLOBS, FOLDERS))
    files += ours
    wrong = [path for path in files if not path.stat().st_size or unsealed(_mapped(path)) is None]
    return len(files) + len(folders), wrong + [one for one in folders if not _is_right(one, use_stamps=False)]


def _say_damaged(path: Path) -> None:
    warnings.warn(f"The cached network '{path.name}' was damaged and is compiled again.", RuntimeWarning, stacklevel=2)


def _mapped(path: Path) -> memoryview:
    return np.memmap(path, dtype=np.uint8, mode="c").data


def _is_right(folder: Path, *, use_stamps: bool = True) -> bool:
    """Whether a large network's files are what was written; with `use_stamps`, those not touched since are not read."""
    try:
        sums = json.loads((folder / SUMS).read_bytes())
        found = {name: [one[0], *_touched(folder / name)] for name, one in sums.items()}
        touched = [name for name, stamp in found.items() if not use_stamps or stamp != sums[name]]
        if not sums or any(_crc(folder / name) != sums[name][0] for name in touched):
            return False
        if found != sums:
            _write_sums(folder, found)
    except (OSError, ValueError, AttributeError, TypeError, IndexError):
        return False
    return True


def _write_sums(folder: Path, sums: Mapping[str, Any]) -> None:
    with suppress(OSError), written_whole(folder / SUMS) as unfinished:
        unfinished.write_text(json.dumps(sums))


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            crc = zlib.crc32(part, crc)
    return crc


def _touched(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


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
