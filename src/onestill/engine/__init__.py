"""The runtimes behind one protocol, and the factory that loads a model into one of them."""

from __future__ import annotations

import importlib.util
import os

from onestill.checkpoint import Additions, ModelInfo, describe, resolve, verify
from onestill.engine.device import AUTO, checked_name, choose, runs_on_cpu
from onestill.engine.protocol import ENGINES, Engine, TorchOptions
from onestill.errors import CheckpointError, MissingExtraError, OnestillError, near

__all__ = ["ENGINES", "Engine", "TorchOptions", "load_engine"]


def load_engine(
    name: str | None = None,
    path: str | os.PathLike[str] = "icons",
    device: str | None = None,
    dtype: str | None = None,
    *,
    threads: int | None = None,
    quick_start: bool = False,
    additions: Additions | None = None,
    options: TorchOptions | None = None,
) -> Engine:
    """Load a model into a runtime.

    Args:
        name: one of `ENGINES`; None and "auto" take OpenVINO where the model has that form and nothing asks for what it
            has not, else torch.
        path: a model's name, folder, single file or Hub id.
        device: "cpu", or for torch also "cuda", "cuda:1", "mps" and the like; None and "auto" are the CPU for OpenVINO
            and, for torch, a GPU where it has one. `onestill.engine.device` chooses.
        dtype: "float32", "bfloat16", "float16" or, on OpenVINO, "int8"; None is what is fastest there: on OpenVINO
            int8 where model and CPU have it, else bfloat16 where the CPU has that, else float32; on torch float32 on a
            CPU and float16 elsewhere.
        threads: how many threads to compute with; None lets the runtime choose.
        quick_start: load sooner and draw slower, where the runtime has that choice; see `onestill.load`.
        additions: what is put on top of the model; torch only.
        options: how torch computes.

    Raises:
        OnestillError: the model, engine, device or dtype is not available; the sentence says what is.
    """
    if name == AUTO:
        name = None
    if name is not None and name not in ENGINES:
        raise OnestillError(f"There is no engine '{name}'; choose from {', '.join(ENGINES)}.{near(name, ENGINES)}")
    checked_name(device)
    folder = resolve(path)
    info = describe(folder, additions)
    verify(folder, contents=True)
    has_openvino = (folder / "openvino" / "index.json").is_file()
    is_changed = bool(info.component_files or info.loras or info.embeddings) or options is not None
    if name is None:
        # On the CPU even where torch has a GPU, unless that is asked for: it starts sooner, and needs no torch.
        takes_openvino = has_openvino and runs_on_cpu(device) and dtype != "float16" and not is_changed
        name = "openvino" if takes_openvino else "torch"
    if name == "torch":
        return _load_torch(info, device, dtype, threads, options)
    if not has_openvino:
        raise CheckpointError(f"'{folder}' has no OpenVINO form; load it with the engine 'torch'.")
    if is_changed:
        raise OnestillError("The engine 'openvino' draws a model as it was exported; choose the engine 'torch'.")
    from onestill.engine.openvino.engine import OpenVinoEngine

    return OpenVinoEngine(info, device=device, dtype=dtype, threads=threads, quick_start=quick_start)


def _load_torch(
    info: ModelInfo, device: str | None, dtype: str | None, threads: int | None, options: TorchOptions | None
) -> Engine:
    for package in ("torch", "diffusers", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("torch", package)
    device = choose(device)
    if options is None and device.startswith("cuda"):
        options = TorchOptions()
    if options is not None:
        from onestill.engine.torch.fast import FastEngine

        return FastEngine(info, options, device=device, dtype=dtype, threads=threads)
    from onestill.engine.torch.eager import TorchEngine

    return TorchEngine(info, device=device, dtype=dtype, threads=threads)
