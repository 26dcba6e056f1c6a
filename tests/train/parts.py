"""Tiny real networks on disk, and one batch of cached latents for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from onestill.networks.condition import Condition
from onestill.networks.contrastive import ContrastiveModel, new_backbone
from onestill.train.batches import batch_condition
from onestill.train.discriminator.cnn import LITE0, EfficientNetLite0
from onestill.train.methods.add import Method
from onestill.train.recipe import parse_recipe
from tests.tiny import MAX_TOKENS, WIDTH, tiny_model

CHANNELS, SIZE = 4, 4


def write_parts(folder: Path) -> Path:
    """A diffusers folder `model` with an AutoencoderTiny, and two towers: `latents` (ViT) and `pixels` (ResNet)."""
    tiny_model(folder / "model", autoencoder="tiny", openvino=False)
    torch.manual_seed(0)
    latents = new_backbone("vit", channels=CHANNELS, size=SIZE, patch=1, width=32, depth=3)
    ContrastiveModel(latents, 16, WIDTH, {"space": "latents"}).save(folder / "latents")
    pixels = new_backbone("resnet", channels=3, size=32, patch=1, width=32, depth=1)
    ContrastiveModel(pixels, 16, WIDTH, {"space": "pixels"}).save(folder / "pixels")
    save_dinov2(folder / "dinov2")
    save_cnn(folder / "lite0")
    return folder


def save_dinov2(folder: Path, image_size: int = 16) -> None:
    """A DINOv2 of two blocks with patches of four pixels."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=image_size, patch_size=4)).save_pretrained(folder)


def save_cnn(folder: Path) -> None:
    """EfficientNet-lite0 at its own width, with random weights."""
    folder.mkdir()
    save_file(EfficientNetLite0().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": LITE0}))


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """Options named as `heads__width` in the tables of a recipe: `{"heads": {"width": ...}}`."""
    tables: dict[str, Any] = {}
    for name, value in options.items():
        *table, key = name.split("__")
        (tables.setdefault(table[0], {}) if table else tables)[key] = value
    return tables


def add_recipe(parts: Path, **options: Any) -> Any:
    model = parts / "model"
    given: dict[str, Any] = {
        "teacher": str(model / "unet"),
        "autoencoder": str(model / "vae"),
        "text_encoder": str(model),
    }
    given["sheet_prompts"] = ["a red star", "a blue cat"] * 8
    given |= {
        "features__tower": str(parts / "latents"),
        "features__tower_layers": [0, 1, 3],
        "heads__width": 16,
        **options,
    }
    loop = {"iterations": 2, "batch_size": 4}
    return parse_recipe({"name": "tiny", "method": "add", "out": "runs/tiny", "loop": loop, "add": nested(given)})


def add_method(parts: Path, **options: Any) -> Method:
    recipe = add_recipe(parts, **options)
    method = Method(recipe.options, recipe.loop)
    method.to(torch.device("cpu"))
    return method


def condition(batch: dict[str, Any]) -> Condition:
    return batch_condition(batch, torch.device("cpu"))


def latents_batch(count: int = 4, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=draw)

    mask = torch.ones(count, MAX_TOKENS, dtype=torch.bool)
    text = noise(MAX_TOKENS, WIDTH)
    return {"latents": noise(CHANNELS, SIZE, SIZE), "text": text, "mask": mask, "captions": ["a red star"] * count}
