"""Models of real size with random weights, so that speed can be measured without a download. `[torch]`

They generate noise. The folder is in diffusers' format, so every engine and diffusers itself load the same files.
Weights are written tensor by tensor from a pool of random numbers, because SDXL's do not fit into every memory at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from onestill.checkpoint import MANIFEST
from onestill.errors import OnestillError, near
from onestill.networks.libraries import quiet_libraries
from onestill.text.tokenize import write_clip_vocabulary

__all__ = ["CLASSES", "CONFIGS", "meta_module", "random_model", "weight_scale"]

POOL = 2**20  # random numbers, reused from random offsets; speed does not depend on the values
Config = Mapping[str, Any]

CONFIGS: Mapping[str, Mapping[str, Config]] = json.loads(
    Path(__file__).with_name("random_weights.json").read_text(encoding="utf-8")
)  # kind -> component -> what its config sets
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "tiny_vae": "AutoencoderTiny",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}


def random_model(
    kind: str, folder: Path, configs: Mapping[str, Config] | None = None, *, seed: int = 0, filled: bool = True
) -> Path:
    """Write a model with random weights in half precision, and beside it, as `tiny_vae`, a tiny decoder.

    Args:
        kind: one of `CONFIGS`: "sdxl" (2.6 billion weights in the UNet alone, 7 GB) or "sd21" (0.9 billion, 2.6 GB).
        folder: a new folder.
        configs: other sizes of the same architecture, as in `CONFIGS`.
        seed: of the weights.
        filled: whether the weight files have contents. Without, they are sparse files of the same length that take
            no space on the disk, for callers that make the weights elsewhere, on a GPU.

    Returns:
        `folder`.

    Raises:
        OnestillError: there is no such kind.
    """
    if kind not in CONFIGS:
        raise OnestillError(
            f"There is no random model '{kind}'; choose from {', '.join(CONFIGS)}.{near(kind, CONFIGS)}"
        )
    numbers = np.random.default_rng(seed)
    pool = numbers.standard_normal(POOL, dtype=np.float32)
    scaled = cache(lambda scale: (pool * scale).astype(np.float16).tobytes())
    offset = lambda: 2 * int(numbers.integers(POOL))  # noqa: E731
    for name, config in (configs or CONFIGS[kind]).items():
        module = meta_module(CLASSES[name], config)
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        (folder / name).mkdir(parents=True)
        values = module.config.to_dict() if name.startswith("text") else dict(module.config)
        (folder / name / "config.json").write_text(json.dumps(values, indent=2, default=str) + "\n")
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        _write(folder / name / f"{stem}.safetensors", shapes, scaled if filled else None, offset)
    _write_rest(kind, folder)
    return folder


def meta_module(kind: str, config: Config) -> Any:
    """A network on the meta device, for its shapes and for counting its operations."""
    with torch.device("meta"), quiet_libraries():
        if hasattr(transformers, kind):
            made = getattr(transformers, kind)
            # A saved config has keys that its class does not accept as arguments; `from_dict` drops them.
            return made(made.config_class.from_dict(dict(config)))
        return getattr(diffusers, kind).from_config(dict(config))


Scaled = Callable[[float], bytes]  # a factor -> the pool times it, in float16
Offset = Callable[[], int]  # where in the pool to start, in bytes


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], scaled: Scaled | None, offset: Offset) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if scaled is None:
            file.truncate(8 + len(text) + end)  # a sparse file
            return
        for name, shape in shapes.items():
            _write_tensor(file, name, shape, scaled, offset)


def weight_scale(name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a random weight [N, ...] that keeps the variance of activations through a layer."""
    is_table = "token_embedding" in name or "position_embedding" in name
    return 0.02 if is_table else float(prod(shape[1:]) ** -0.5)


def _write_tensor(file: Any, name: str, shape: tuple[int, ...], scaled: Scaled, offset: Offset) -> None:
    if len(shape) < 2:  # norms' weights are 1, biases 0
        file.write(np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float16).tobytes())
        return
    numbers = memoryview(scaled(weight_scale(name, shape)))
    left = 2 * prod(shape)
    while left:
        part = numbers[offset() :][:left]
        file.write(part)
        left -= len(part)


def _write_rest(kind: str, folder: Path) -> None:
    is_xl = kind == "sdxl"
    names = ("text_encoder", "text_encoder_2", "unet", "vae") if is_xl else ("text_encoder", "unet", "vae")
    classes = {name: ["transformers" if name.startswith("text") else "diffusers", CLASSES[name]] for name in names}
    scheduler = "EulerAncestralDiscreteScheduler" if is_xl else "EulerDiscreteScheduler"
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline",
        **classes,
        "scheduler": ["diffusers", scheduler],
    }
    if not is_xl:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    for name in ("tokenizer", "tokenizer_2") if is_xl else ("tokenizer",):
        (folder / name).mkdir()
        write_clip_vocabulary(folder / name)
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "pad_token": "!" if name == "tokenizer_2" else "<|endoftext|>",
        }
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    turbo = {"_class_name": scheduler, **betas, "timestep_spacing": "trailing", "prediction_type": "epsilon"}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(turbo, indent=2) + "\n")
    facts = {"name": f"random-{kind}", "num_inference_steps": 1, "made": {"weights": "random"}}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n")
