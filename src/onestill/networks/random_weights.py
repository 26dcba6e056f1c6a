"""Models of real size with random weights: speed can be measured without a download. They draw noise. `[torch]`

The folder is as any other in diffusers' format, so that every engine and diffusers itself load the same files. Weights
are written tensor by tensor from a pool of random numbers, as SDXL's would not fit into every memory at once.
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

POOL = 2**20  # random numbers, used again from other places; a network of noise is as slow as any
Config = Mapping[str, Any]

_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
CONFIGS: Mapping[str, Mapping[str, Config]] = {
    "sdxl": {
        "unet": {
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": _VAE | {"scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": _TEXT
        | {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "quick_gelu",
            "projection_dim": 768,
        },
        "text_encoder_2": _TEXT
        | {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "intermediate_size": 5120,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        },
        "tiny_vae": {},
    },
    "sd21": {
        "unet": {
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": _VAE | {"scaling_factor": 0.18215, "force_upcast": False},
        "text_encoder": _TEXT
        | {
            "hidden_size": 1024,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "hidden_act": "gelu",
            "projection_dim": 512,
        },
        "tiny_vae": {},
    },
}
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
        filled: whether there is anything in the files of weights. Without, they are as long and take no room on the
            disk: for who makes the weights elsewhere, on a GPU.

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
    place = lambda: 2 * int(numbers.integers(POOL))  # noqa: E731
    for name, config in (configs or CONFIGS[kind]).items():
        module = meta_module(CLASSES[name], config)
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        (folder / name).mkdir(parents=True)
        values = module.config.to_dict() if name.startswith("text") else dict(module.config)
        (folder / name / "config.json").write_text(json.dumps(values, indent=2, default=str) + "\n")
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        _write(folder / name / f"{stem}.safetensors", shapes, scaled if filled else None, place)
    _write_rest(kind, folder)
    return folder


def meta_module(kind: str, config: Config) -> Any:
    """A network without weights, for its shapes and the count of its operations."""
    with torch.device("meta"), quiet_libraries():
        if hasattr(transformers, kind):
            made = getattr(transformers, kind)
            # A saved config says more than its class takes back.
            return made(made.config_class.from_dict(dict(config)))
        return getattr(diffusers, kind).from_config(dict(config))


Scaled = Callable[[float], bytes]  # a factor -> the pool times it, in float16
Place = Callable[[], int]  # where in the pool to start, in bytes


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], scaled: Scaled | None, place: Place) -> None:
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
            file.truncate(8 + len(text) + end)  # a hole, which file systems store as nothing
            return
        for name, shape in shapes.items():
            _write_tensor(file, name, shape, scaled, place)


def weight_scale(name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a random weight [N, ...]: what keeps the size of what goes through, layer by layer."""
    is_table = "token_embedding" in name or "position_embedding" in name
    return 0.02 if is_table else float(prod(shape[1:]) ** -0.5)


def _write_tensor(file: Any, name: str, shape: tuple[int, ...], scaled: Scaled, place: Place) -> None:
    if len(shape) < 2:  # norms' weights are 1, biases 0
        file.write(np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float16).tobytes())
        return
    numbers = memoryview(scaled(weight_scale(name, shape)))
    left = 2 * prod(shape)
    while left:
        part = numbers[place() :][:left]
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
