"""How long words take to become a picture, part by part: ours and diffusers', on the same weights, prompts and seeds.

A contender measures in a process of its own, which `python -m onestill.evaluate.latency` is: in one process they would
share thread pools and memory. Every prompt is new to it, so that no state is remembered, but where `cached` says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from onestill.engine.device import choose, default_dtype, peak_memory, synchronize
from onestill.errors import OnestillError, require

__all__ = ["CONTENDERS", "Setting", "measure", "measure_elsewhere", "percentile", "prompts", "psnr"]

CONTENDERS = ("onestill", "diffusers", "diffusers compiled")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "pink", "brown")
THINGS = ("apple", "bicycle", "heart", "house", "star", "cat", "key", "cloud", "boat", "book", "bell", "tree")
STYLES = ("fluent 3d emoji", "flat emoji", "line icon", "filled icon", "pixel art")
PARTS = ("encode_ms", "denoise_ms", "decode_ms", "total_ms")

Draw = Callable[[Sequence[str], int], Mapping[str, float]]  # (prompts, seed) -> milliseconds by part


@dataclass(frozen=True)
class Setting:
    """One contender and what it is asked for.

    Attributes:
        contender: one of `CONTENDERS`.
        model: a name, folder, file or Hub id; a folder or Hub id for diffusers.
        engine, device, dtype, threads: as in `onestill.load`; diffusers takes those that it has.
        tiny_vae: a folder with a tiny decoder, or None.
        options: ours, what `onestill.engine.TorchOptions` takes; None is the fast way on a GPU and the plain on a CPU.
        steps, height, width: None is the model's own.
        batch: images to a call.
        warm_up: calls before those that count.
        pictures: calls that count.
        repeats: calls after those, of a prompt that was just drawn.
        seed: of the first image.
        picture: a file to which the first image of the first call is saved, so that contenders can be compared.
    """

    contender: str
    model: str
    engine: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    tiny_vae: str | None = None
    options: Mapping[str, Any] | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int = 1
    warm_up: int = 3
    pictures: int = 20
    repeats: int = 5
    seed: int = 1
    picture: str | None = None


def prompts(count: int) -> list[str]:
    """As many prompts, all different."""
    whole = [f"a {colour} {thing}, {style}" for style, thing, colour in product(STYLES, THINGS, COLOURS)]
    return [f"{whole[i % len(whole)]} {i // len(whole) or ''}".strip() for i in range(count)]


def measure_elsewhere(setting: Setting, *, most_s: float | None = None) -> dict[str, Any]:
    """`measure` in a process of its own, which is ended after `most_s` seconds.

    Raises:
        OnestillError: it failed, or took longer; the sentence is the process's own.
    """
    command = [sys.executable, "-m", "onestill.evaluate.latency", json.dumps(asdict(setting))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=most_s)
    except subprocess.TimeoutExpired:
        raise OnestillError(f"Measuring {setting.contender} took more than {most_s:.0f} s and was ended.") from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        raise OnestillError(f"Measuring {setting.contender} failed: {said[-1] if said else 'it was ended'}.")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure(setting: Setting) -> dict[str, Any]:
    """Load one contender in this process, let it warm up, and time every call.

    Returns:
        What was asked for, `load_ms`, `first_ms` (the first call), for each part its median and 95th percentile,
        `cached_ms` (the median of the repeats, None without), `images_per_second` and `peak_memory_mb`.

    Raises:
        OnestillError: there is no such contender, or it cannot be loaded.
    """
    if setting.contender not in CONTENDERS:
        raise OnestillError(f"There is no contender '{setting.contender}'; choose from {', '.join(CONTENDERS)}.")
    started = time.perf_counter()
    draw, facts = _ours(setting) if setting.contender == "onestill" else _diffusers(setting)
    loaded = time.perf_counter()
    words = prompts((setting.warm_up + setting.pictures) * setting.batch)
    times: list[Mapping[str, float]] = []
    for i in range(setting.warm_up + setting.pictures):
        some = words[i * setting.batch : (i + 1) * setting.batch]
        times.append(draw(some, setting.seed + i * setting.batch))
    last = words[(setting.warm_up + setting.pictures - 1) * setting.batch :][: setting.batch]
    again = [draw(last, setting.seed + i)["total_ms"] for i in range(setting.repeats)]
    counted = times[setting.warm_up :]
    total = percentile([one["total_ms"] for one in counted], 50)
    return {
        **asdict(setting),
        **facts,
        "load_ms": round(1000 * (loaded - started), 1),
        "first_ms": round(times[0]["total_ms"], 1),
        **{part: _summary([one[part] for one in counted]) for part in PARTS},
        "cached_ms": round(percentile(again, 50), 2) if again else None,
        "images_per_second": round(1000 * setting.batch / total, 3),
        "peak_memory_mb": round(_peak_memory(facts["device"]) / 1e6, 1),
    }


def psnr(first: Path, second: Path) -> float | None:
    """Decibels between two pictures; None where they are equal."""
    a, b = (np.asarray(PIL.Image.open(path), dtype=np.float64) for path in (first, second))
    error = float(((a - b) ** 2).mean())
    return None if error == 0 else round(float(10 * np.log10(255**2 / error)), 1)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed, the nearest one that was measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"p50": round(percentile(values, 50), 2), "p95": round(percentile(values, 95), 2)}


def _peak_memory(device: str) -> float:
    """Bytes: of the GPU where one computes, else of this process."""
    if (on_gpu := peak_memory(device)) is not None:
        return on_gpu
    if sys.platform == "win32":
        return float("nan")
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


# --- contenders -----------------------------------------------------------------------------------------------------


def _ours(setting: Setting) -> tuple[Draw, dict[str, Any]]:
    from onestill.engine import TorchOptions
    from onestill.pipeline import load

    pipe = load(
        setting.model,
        engine=setting.engine,
        device=setting.device,
        dtype=setting.dtype,
        threads=setting.threads,
        tiny_vae=setting.tiny_vae,
        options=None if setting.options is None else TorchOptions(**setting.options),
    )
    drawing: dict[str, Any] = {"num_inference_steps": setting.steps, "height": setting.height, "width": setting.width}

    def draw(words: Sequence[str], seed: int) -> Mapping[str, float]:
        out = pipe(list(words), seed=seed, **drawing)
        if setting.picture is not None and not Path(setting.picture).exists():
            out.save(0, setting.picture)
        return {part: float(getattr(out.timings, part)) for part in PARTS}

    engine = pipe.engine
    return draw, {"engine": engine.name, "device": engine.device, "dtype": engine.dtype}


def _diffusers_pipeline(setting: Setting, folder: Path, device: str, dtype: Any) -> Any:
    """As diffusers' documentation has it, and compiled as its page on speed has it."""
    torch, diffusers = require("torch", "torch"), require("diffusers", "torch")
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder.resolve()), torch_dtype=dtype)
    if setting.tiny_vae is not None:
        pipe.vae = diffusers.AutoencoderTiny.from_pretrained(setting.tiny_vae, torch_dtype=dtype)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if setting.contender == "diffusers compiled":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.fuse_qkv_projections(vae=setting.tiny_vae is None)
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True)
    return pipe


def _diffusers(setting: Setting) -> tuple[Draw, dict[str, Any]]:
    """One call of diffusers' pipeline, timed in its three parts."""
    torch = require("torch", "torch")
    from onestill.checkpoint import describe, resolve

    folder = resolve(setting.model)
    if folder.is_file():
        raise OnestillError("diffusers needs other files from a hub for a single file; compare on a folder or Hub id.")
    info = describe(folder)
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    warnings.simplefilter("ignore")
    device = choose(setting.device)
    dtype = getattr(torch, setting.dtype or default_dtype(device))
    pipe = _diffusers_pipeline(setting, folder, device, dtype)
    steps = setting.steps or info.num_inference_steps
    sizes = {"height": setting.height or info.height, "width": setting.width or info.width}

    @torch.inference_mode()  # type: ignore[untyped-decorator] # torch is not imported where this is checked
    def draw(words: Sequence[str], seed: int) -> Mapping[str, float]:
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(words))]
        marks = [time.perf_counter()]

        def mark() -> None:
            synchronize(device)
            marks.append(time.perf_counter())

        encoded = pipe.encode_prompt(
            list(words), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        mark()
        told = {"prompt_embeds": encoded[0]} | ({"pooled_prompt_embeds": encoded[2]} if info.is_xl else {})
        latents = pipe(
            **told, num_inference_steps=steps, guidance_scale=1.0, generator=generators, output_type="latent", **sizes
        ).images
        mark()
        # Its own rule where half precision would overflow: decode in float32.
        upcast = pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast
        if upcast:
            pipe.vae.float()
        z = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
        images = pipe.image_processor.postprocess(pipe.vae.decode(z, return_dict=False)[0], output_type="pil")
        if upcast:
            pipe.vae.half()
        mark()
        if setting.picture is not None and not Path(setting.picture).exists():
            images[0].save(setting.picture)
        spent = [1000 * (second - first) for first, second in pairwise(marks)]
        return dict(zip(PARTS, [*spent, sum(spent)], strict=True))

    return draw, {"engine": "diffusers", "device": device, "dtype": str(dtype).removeprefix("torch.")}


def with_contender(setting: Setting, contender: str) -> Setting:
    """The same, asked of another: what only ours understands is left out."""
    if contender == "onestill":
        return setting
    dtype = None if setting.dtype == "int8" else setting.dtype
    return replace(setting, contender=contender, engine=None, options=None, dtype=dtype)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        print(json.dumps(measure(Setting(**json.loads(sys.argv[1])))))
    except OnestillError as failure:
        sys.exit(str(failure).rstrip("."))
