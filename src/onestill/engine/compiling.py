"""What makes torch's networks fast before they run: layout, fused products, quantised layers, compiling. `[torch]`"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from onestill.checkpoint import ModelInfo, cache_folder, written_whole
from onestill.engine import TorchOptions
from onestill.engine.networks import Networks
from onestill.errors import OnestillError, near, require

__all__ = ["ATTENTIONS", "COMPILES", "QUANTIZES", "compiled", "prepared", "save_compiled"]

ATTENTIONS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
COMPILES = ("none", "regional", "whole")
QUANTIZES = ("none", "int8", "fp8")
LEAST_WIDTH = 512  # of a linear layer that is quantised: smaller ones lose quality and gain nothing
SHAPES = 64  # to compile for, at most: 4 numbers of images, and sizes; torch gives up at 8 unless told
MODE = "max-autotune-no-cudagraphs"  # the graphs are ours


def prepared(networks: Networks, options: TorchOptions, *, on_gpu: bool) -> None:
    """Change a model's modules, in place, as the options ask.

    Raises:
        OnestillError: an option does not exist, or cannot be had on this device.
        MissingExtraError: torchao is asked for and not installed.
    """
    _check("compile", options.compile, COMPILES)
    _check("quantize", options.quantize, QUANTIZES)
    if options.attention is not None:
        _check("attention", options.attention, tuple(ATTENTIONS))
    modules = list(dict.fromkeys([networks.unet, networks.decoder]))
    if on_gpu if options.channels_last is None else options.channels_last:
        for module in modules:
            module.to(memory_format=torch.channels_last)
    if on_gpu if options.fuse is None else options.fuse:
        networks.unet.fuse_qkv_projections()
    if options.quantize != "none":
        _quantize(networks, options, on_gpu)


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OnestillError(f"{name} is '{value}'; choose from {', '.join(known)}.{near(value, known)}")


def _quantize(networks: Networks, options: TorchOptions, on_gpu: bool) -> None:
    if on_gpu and options.compile == "none":
        raise OnestillError(
            f"quantize '{options.quantize}' without compiling is many times slower than none at all; add compile "
            "'regional' or 'whole'."
        )
    if options.quantize == "fp8" and not (on_gpu and torch.cuda.get_device_capability(networks.device) >= (8, 9)):
        raise OnestillError("quantize 'fp8' needs a GPU of NVIDIA's Ada or Hopper generation or later; choose 'int8'.")
    if options.quantize == "fp8" and networks.dtype != torch.bfloat16:
        raise OnestillError("quantize 'fp8' computes in bfloat16; load the model with dtype 'bfloat16'.")
    library = require("torchao.quantization", "fast")
    if options.quantize == "fp8":
        config = library.Float8DynamicActivationFloat8WeightConfig(granularity=library.PerRow())
    else:
        config = library.Int8DynamicActivationInt8WeightConfig()

    def is_large(module: torch.nn.Module, name: str) -> bool:
        del name
        return isinstance(module, torch.nn.Linear) and min(module.in_features, module.out_features) >= LEAST_WIDTH

    library.quantize_(networks.unet, config, filter_fn=is_large)


# --- compiling ------------------------------------------------------------------------------------------------------


def compiled(networks: Networks, options: TorchOptions, info: ModelInfo, dtype: str) -> Callable[..., torch.Tensor]:
    """The UNet's call, `Networks.output`, with the attention and the compilation that the options ask for.

    Nothing is compiled before the first call, which finds what an earlier process left in the cache.
    """
    if options.compile != "none":
        _load_artifacts(artifacts(networks, options, info, dtype))
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, SHAPES)
        if options.compile == "regional":
            networks.unet.compile_repeated_blocks(fullgraph=True)
        else:
            networks.unet.compile(mode=MODE, fullgraph=True, dynamic=False)
            networks.decoder.decoder.compile(mode=MODE, fullgraph=True, dynamic=False)
    if options.attention is None:
        return networks.output
    backend = ATTENTIONS[options.attention]

    def output(*inputs: Any) -> torch.Tensor:
        with sdpa_kernel(backend):
            return networks.output(*inputs)

    return output


def artifacts(networks: Networks, options: TorchOptions, info: ModelInfo, dtype: str) -> Path:
    """Where what was compiled for a model and machine is kept. Only this user's own cache is ever read: it is code."""
    device = networks.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = [
        torch.__version__,
        machine,
        dtype,
        repr(options),
        repr(sorted(dict(networks.unet.config).items(), key=str)),
    ]
    key = hashlib.sha256("\n".join([*parts, info.family]).encode()).hexdigest()[:32]
    return cache_folder() / "torch" / f"{key}.bin"


def save_compiled(networks: Networks, options: TorchOptions, info: ModelInfo, dtype: str) -> Path | None:
    """Keep what this process has compiled for the next one. Returns where, None where there is nothing to keep."""
    if options.compile == "none" or (found := torch.compiler.save_cache_artifacts()) is None:
        return None
    path = artifacts(networks, options, info, dtype)
    # Only a speed-up: a cache that cannot be written must not stop anyone from drawing.
    with contextlib.suppress(OSError), written_whole(path) as unfinished:
        unfinished.write_bytes(found[0])
    return path


def _load_artifacts(path: Path) -> None:
    try:
        content = path.read_bytes()
    except OSError:
        logging.getLogger("onestill").info("compiling for the first time, which takes minutes; the result is kept")
        return
    torch.compiler.load_cache_artifacts(content)
