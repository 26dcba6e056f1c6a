"""How torch's networks are made fast before they run: layout, fused products, quantised layers, compiling. `[torch]`"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

from onestill.checkpoint import ModelInfo, cache_folder, seal, unsealed, written_whole
from onestill.engine.protocol import TorchOptions
from onestill.errors import OnestillError, near, require
from onestill.networks.inference import Networks

ATTENTIONS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
CHOICES = {  # of options; an attention may also be None
    "compile": ("none", "regional", "whole"),
    "quantize": ("none", "int8", "fp8"),
    "attention": tuple(ATTENTIONS),
}
LEAST_WIDTH = 512  # of a linear layer that is quantised: smaller ones lose quality and gain nothing
# Kinds of block times numbers of images times sizes to compile for; torch gives up at 8. More are drawn uncompiled.
MOST_COMPILED = 256
BACKEND = "inductor"
MODE = "max-autotune-no-cudagraphs"  # the graphs are ours


def prepared(networks: Networks, options: TorchOptions, *, on_gpu: bool) -> None:
    """Change a model's modules, in place, as the options ask.

    Raises:
        OnestillError: an option does not exist, or cannot be had on this device.
        MissingExtraError: torchao is asked for and not installed.
    """
    for name, known in CHOICES.items():
        value = getattr(options, name)
        if value is not None and value not in known:
            raise OnestillError(f"{name} is '{value}'; choose from {', '.join(known)}.{near(value, known)}")
    modules = list(dict.fromkeys([networks.unet, networks.latent_space.decoder]))
    # Uncompiled, CUDA's group norm copies what is channels last to the other layout, each time.
    if on_gpu and options.compile == "whole" if options.channels_last is None else options.channels_last:
        for module in modules:
            module.to(memory_format=torch.channels_last)
    if on_gpu if options.fuse is None else options.fuse:
        fuse(networks.unet)
    if options.quantize != "none":
        _quantize(networks, options, on_gpu)


def fuse(unet: Any) -> None:
    """Compute the q, k and v of each of a UNet's attentions as one product, of cross-attentions k and v, in place.

    The weights are moved, one attention after the other, not doubled as by diffusers' own method; there is no way back.

    Raises:
        OnestillError: an attention of the model takes further inputs, which no fused one does.
    """
    if any("Added" in type(processor).__name__ for processor in unet.attn_processors.values()):
        raise OnestillError("This model's attentions take further inputs and cannot be fused; load it with fuse=False.")
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse_projections(fuse=True)
            for name in ("to_k", "to_v") if module.is_cross_attention else ("to_q", "to_k", "to_v"):
                delattr(module, name)
    unet.set_attn_processor(FusedAttnProcessor2_0())


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

    Nothing is compiled before the first call, which finds what an earlier process left in the cache. It must be made
    within `run_as_asked`.
    """
    if options.compile != "none":
        _load_artifacts(artifacts(networks, options, info, dtype))
        # For each shape by itself: code for any number of images is slower, and the second number would bring it.
        settings: dict[str, Any] = {"backend": BACKEND, "fullgraph": True, "dynamic": False}
        if options.compile == "regional":
            networks.unet.compile_repeated_blocks(**settings)
        else:
            networks.unet.compile(mode=MODE, **settings)
            networks.latent_space.decoder.decoder.compile(mode=MODE, **settings)
    if options.attention is None:
        return networks.output
    backend = ATTENTIONS[options.attention]

    def output(*inputs: Any) -> torch.Tensor:
        with sdpa_kernel(backend):
            return networks.output(*inputs)

    return output


def run_as_asked(function: Callable[..., Any], options: TorchOptions) -> Callable[..., Any]:
    """A function of a model's networks, run under the settings of torch that the options ask for.

    They are set around each call and not once: dynamo's belong to a thread from torch 2.13 on, and a server loads a
    model in one thread and draws in another.
    """
    if options.compile == "none" and not options.cudnn_benchmark:
        return function

    def run(*inputs: Any) -> Any:
        with contextlib.ExitStack() as settings:
            if options.cudnn_benchmark:
                settings.enter_context(_cudnn_benchmark())
            if options.compile == "none":
                return function(*inputs)
            limits = {"recompile_limit": MOST_COMPILED, "accumulated_recompile_limit": MOST_COMPILED}
            settings.enter_context(torch._dynamo.config.patch(limits))
            try:
                return function(*inputs)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                settings.enter_context(torch.compiler.set_stance("eager_on_recompile"))
                return function(*inputs)

    return run


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Have cuDNN measure its ways to compute a convolution of a new shape. The setting is the whole process's."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def artifacts(networks: Networks, options: TorchOptions, info: ModelInfo, dtype: str) -> Path:
    """The file that caches what was compiled for a model and machine. Only this user's own is ever read: it is code."""
    device = networks.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = [
        f"{torch.__version__} sealed",
        machine,
        dtype,
        repr(options),
        repr(sorted(dict(networks.unet.config).items(), key=str)),
    ]
    key = hashlib.sha256("\n".join([*parts, info.family]).encode()).hexdigest()[:32]
    return cache_folder() / "torch" / f"{key}.bin"


def save_compiled(networks: Networks, options: TorchOptions, info: ModelInfo, dtype: str) -> Path | None:
    """Cache what this process has compiled for the next one. Returns the file, None where there is nothing to cache."""
    if options.compile == "none" or (found := torch.compiler.save_cache_artifacts()) is None:
        return None
    path = artifacts(networks, options, info, dtype)
    # Only a speed-up: a cache that cannot be written must not stop anyone from drawing.
    with contextlib.suppress(OSError), written_whole(path) as unfinished:
        unfinished.write_bytes(found[0] + seal(found[0]))
    return path


def _load_artifacts(path: Path) -> None:
    try:
        content = path.read_bytes()
    except OSError:
        logging.getLogger("onestill").info("compiling for the first time, which takes minutes; the result is cached")
        return
    if (whole := unsealed(memoryview(content))) is None:
        warnings.warn(f"The cached code '{path.name}' was damaged and is compiled again.", RuntimeWarning, stacklevel=2)
        return
    torch.compiler.load_cache_artifacts(bytes(whole))
