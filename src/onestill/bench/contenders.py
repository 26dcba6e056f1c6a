"""The contenders of a latency comparison, loaded: ours by its pipeline, diffusers by its own. `[torch]` for diffusers.

A comparison changes one thing, who draws. So the type of each part is reported, and `comparable` asks
both for the same where their own rules would part them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from onestill.bench.setting import PARTS, Loaded, Setting
from onestill.checkpoint import ModelInfo, describe, read_json, resolve
from onestill.engine.device import AUTO, choose, default_dtype, is_auto, runs_on_cpu, synchronize
from onestill.errors import OnestillError, require
from onestill.pipeline import Pipeline, load

NETWORKS = ("text", "unet", "decoder")


def load_contender(setting: Setting) -> Loaded:
    """Load what a setting asks for.

    Raises:
        OnestillError: it cannot be loaded; the sentence says why.
    """
    return _load_ours(setting) if setting.contender == "onestill" else _load_diffusers(setting)


def comparable(setting: Setting) -> Setting:
    """What both contenders are asked for where ours is compared with diffusers.

    Where SDXL's autoencoder would overflow in float16, ours decodes in bfloat16 on a GPU and diffusers casts the
    autoencoder to float32 and back for each picture: a ratio of the two would be one of types. In bfloat16 nothing is
    cast, and a tiny VAE never is.

    Args:
        setting: ours, whose model diffusers loads too.

    Raises:
        OnestillError: float16 is asked for by name where only other types can be compared.
    """
    if (
        not _device(setting).startswith("cuda")
        or setting.tiny_vae is not None
        or setting.dtype not in (None, "float16")
    ):
        return setting
    folder = resolve(setting.model)
    if folder.is_file() or not _overflows(folder) or require("torch", "torch").cuda.get_device_capability() < (8, 0):
        return setting
    if setting.dtype is None:
        return replace(setting, dtype="bfloat16")
    raise OnestillError(
        "In float16 diffusers decodes this model in float32 and onestill in bfloat16, which is no comparison; compare "
        "with --dtype bfloat16, or with --tiny-vae."
    )


def _device(setting: Setting) -> str:
    """Where what a setting asks for runs: the CPU where ours draws by OpenVINO, else where torch would."""
    by_openvino = setting.engine in (None, AUTO, "openvino") and runs_on_cpu(setting.device) and setting.options is None
    if by_openvino and (resolve(setting.model) / "openvino" / "index.json").is_file():
        return "cpu"
    return choose() if is_auto(setting.device) else str(setting.device)


def _overflows(folder: Path) -> bool:
    """Whether diffusers would decode a model in float32 where it computes in float16."""
    config = read_json(folder, "vae/config.json")
    return config.get("_class_name", "AutoencoderKL") == "AutoencoderKL" and bool(config.get("force_upcast", True))


# --- ours -----------------------------------------------------------------------------------------------------------


def _load_ours(setting: Setting) -> Loaded:
    from onestill.engine.protocol import TorchOptions

    pipe = load(
        setting.model,
        engine=setting.engine,
        device=setting.device,
        dtype=setting.dtype,
        threads=setting.threads,
        tiny_vae=setting.tiny_vae,
        options=None if setting.options is None else TorchOptions(**setting.options),
    )
    return our_contender(pipe, setting)


def our_contender(pipe: Pipeline, setting: Setting) -> Loaded:
    """A loaded pipeline that draws what a setting asks for."""
    drawing: dict[str, Any] = {"num_inference_steps": setting.steps, "height": setting.height, "width": setting.width}

    def draw(prompts: Sequence[str], seed: int) -> Mapping[str, float]:
        out = pipe(list(prompts), seed=seed, **drawing)
        if setting.picture is not None and not Path(setting.picture).exists():
            out.save(0, setting.picture)
        return vars(out.timings)

    engine = pipe.engine
    facts = {"engine": engine.name, "device": engine.device, "dtype": engine.dtype, "dtypes": _our_dtypes(engine)}
    return Loaded(draw, facts)


def _our_dtypes(engine: Any) -> dict[str, str]:
    if engine.name != "torch":  # torch's engines alone keep parts in types of their own
        return dict.fromkeys(NETWORKS, str(engine.dtype))
    networks = engine._networks
    parts = (networks.text_encoder.towers[0], networks.unet, networks.latent_space.decoder)
    return {name: _dtype_of(part) for name, part in zip(NETWORKS, parts, strict=True)}


def _dtype_of(module: Any) -> str:
    """What a network computes in: the type of its first weights."""
    kinds = (one.dtype for one in module.parameters() if one.is_floating_point())
    return str(next(kinds)).removeprefix("torch.")


# --- diffusers ------------------------------------------------------------------------------------------------------


def _load_diffusers(setting: Setting) -> Loaded:
    torch, diffusers = require("torch", "torch"), require("diffusers", "torch")
    folder = resolve(setting.model)
    if folder.is_file():
        raise OnestillError("diffusers needs other files from a hub for a single file; compare on a folder or Hub id.")
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    warnings.simplefilter("ignore")
    device = choose(setting.device)
    dtype = getattr(torch, setting.dtype or default_dtype(device))
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder.resolve()), torch_dtype=dtype)
    if setting.tiny_vae is not None:
        pipe.vae = diffusers.AutoencoderTiny.from_pretrained(setting.tiny_vae, torch_dtype=dtype)
    return diffusers_contender(diffusers_pipeline(pipe.to(device), setting), setting, describe(folder))


def diffusers_pipeline(pipe: Any, setting: Setting) -> Any:
    """A pipeline on its device as diffusers' documentation has it; compiled, as its page on speed has that.

    Args:
        pipe: StableDiffusionPipeline or StableDiffusionXLPipeline; changed in place.
        setting: of the contender "diffusers" or "diffusers compiled".
    """
    torch = require("torch", "torch")
    pipe.set_progress_bar_config(disable=True)
    if setting.contender == "diffusers compiled":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.fuse_qkv_projections(vae=setting.tiny_vae is None)
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True)
    return pipe


def diffusers_contender(pipe: Any, setting: Setting, info: ModelInfo) -> Loaded:
    """A pipeline that draws what a setting asks for, each call timed in its three parts."""
    torch = require("torch", "torch")
    device = str(pipe.device)
    # Its own rule where half precision would overflow: decode in float32.
    upcast = pipe.vae.dtype == torch.float16 and bool(pipe.vae.config.force_upcast)
    steps = setting.steps or info.num_inference_steps
    sizes = {"height": setting.height or info.height, "width": setting.width or info.width}

    def decoded(latents: Any) -> Any:
        if upcast:
            pipe.vae.float()
        z = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
        images = pipe.image_processor.postprocess(pipe.vae.decode(z, return_dict=False)[0], output_type="pil")
        if upcast:
            pipe.vae.half()
        return images

    @torch.inference_mode()  # type: ignore[untyped-decorator] # torch is not imported where this is checked
    def draw(prompts: Sequence[str], seed: int) -> Mapping[str, float]:
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
        marks = [time.perf_counter()]

        def mark() -> None:
            synchronize(device)
            marks.append(time.perf_counter())

        encoded = pipe.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        mark()
        states = {"prompt_embeds": encoded[0]} | ({"pooled_prompt_embeds": encoded[2]} if info.is_xl else {})
        latents = pipe(
            **states, num_inference_steps=steps, guidance_scale=1.0, generator=generators, output_type="latent", **sizes
        ).images
        mark()
        images = decoded(latents)
        mark()
        if setting.picture is not None and not Path(setting.picture).exists():
            images[0].save(setting.picture)
        spent = [1000 * (second - first) for first, second in pairwise(marks)]
        return dict(zip(PARTS, [*spent, sum(spent)], strict=True))

    modules = (pipe.text_encoder, pipe.unet, pipe.vae)
    dtypes = {name: _dtype_of(module) for name, module in zip(NETWORKS, modules, strict=True)}
    facts = {"engine": "diffusers", "device": device, "dtype": dtypes["unet"]}
    return Loaded(draw, {**facts, "dtypes": dtypes | ({"decoder": "float32"} if upcast else {})})
