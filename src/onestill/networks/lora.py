"""LoRA files: low-rank changes added to a model's weights once, when it is loaded, so that drawing costs no more.

A LoRA is a pair of small matrices for each changed layer, W + scale * alpha / rank * up @ down. Files name the layers
in several ways: by the module's own path (`unet.down_blocks.1...to_q.lora_A.weight`, of diffusers and peft), or by that
path, or the original single file's, joined with underscores (`lora_unet_input_blocks_4_1_...lora_down.weight`, of
kohya's trainer). All are understood by making every name that a module may have, not by taking names apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from onestill.checkpoint import Lora, ModelInfo
from onestill.checkpoint.header import read_header
from onestill.checkpoint.layout import short_text_name, unet_place
from onestill.errors import CheckpointError

__all__ = ["add_loras"]

ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
OTHER_KINDS = re.compile(r"hada_w|lokr_w|dora_scale|oft_|glora|\.diff(_b)?$")
KOHYA = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",), "unet": ("lora_unet_",)}
DOTTED = {"text_encoder": ("text_encoder.",), "text_encoder_2": ("text_encoder_2.",), "unet": ("unet.", "")}
MOST_NAMED = 3


class Layer(NamedTuple):
    """A module whose weight can be changed, by the component's and its own name."""

    component: str
    name: str


@dataclass
class Change:
    """What a file says of one layer."""

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: float | None = None


def add_loras(parts: Mapping[str, Any], info: ModelInfo) -> None:
    """Add every LoRA of a model to its modules, in place and in float32.

    Args:
        parts: component -> module.
        info: the model, with its `loras`.

    Raises:
        CheckpointError: a file is no LoRA, is of a kind that is not understood, or changes layers that the model does
            not have, or has in other shapes; the sentence counts and names them.
        UnsafeFormatError: it is a pickle.
    """
    if not info.loras:
        return
    names = _names(parts, info)
    for lora in info.loras:
        _add(parts, lora, _read(lora, names))


def _names(parts: Mapping[str, Any], info: ModelInfo) -> dict[str, Layer]:
    """Every name that a file may give a layer -> the layer."""
    found: dict[str, Layer] = {}
    for component in ("text_encoder", "text_encoder_2", "unet"):
        if component not in parts:
            continue
        module = parts[component]
        layers = [name for name, one in module.named_modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)]
        for name in layers:
            for spelling in _spellings(component, name, module):
                dotted = {start + spelling for start in DOTTED[component]}
                kohya = {start + spelling.replace(".", "_") for start in KOHYA[component]}
                found |= dict.fromkeys(dotted | kohya, Layer(component, name))
    return found


def _spellings(component: str, name: str, module: Any) -> set[str]:
    if component.startswith("text_encoder"):
        return {name, short_text_name(name), f"text_model.{short_text_name(name)}"}
    blocks = getattr(module, "up_blocks", [])
    ups = frozenset(i for i, block in enumerate(blocks) if getattr(block, "has_cross_attention", False))
    place = unet_place(f"{name}.weight", module.config.layers_per_block, ups)
    return {name, place.name.removesuffix(".weight")} if place is not None else {name}


def _read(lora: Lora, names: Mapping[str, Layer]) -> dict[Layer, Change]:
    header = read_header(lora.path)
    if strange := [key for key in header.tensors if OTHER_KINDS.search(key)]:
        raise CheckpointError(f"'{lora.path}' is no plain LoRA (it has '{strange[0]}'); give one of the usual kind.")
    found: dict[Layer, Change] = {}
    unknown: dict[str, None] = {}
    with safe_open(str(lora.path), framework="pt") as file:
        for key in header.tensors:
            end = next((end for end in ENDS if key.endswith(end)), None)
            if end is None:
                unknown[key] = None
                continue
            layer = _layer(key.removesuffix(end), names)
            if layer is None:
                unknown[key.removesuffix(end)] = None
                continue
            change = found.setdefault(layer, Change())
            value = file.get_tensor(key).float()
            setattr(change, ENDS[end], float(value) if ENDS[end] == "alpha" else value)
    if unknown or not found:
        shown = ", ".join(f"'{name}'" for name in list(unknown)[:MOST_NAMED])
        raise CheckpointError(
            f"'{lora.path}' changes {len(unknown)} layers that this model does not have ({shown}); it is for another "
            "family."
            if unknown
            else f"'{lora.path}' is no LoRA: it changes nothing."
        )
    return found


def _layer(name: str, names: Mapping[str, Layer]) -> Layer | None:
    # Older diffusers put the matrices into the attention's processor: ...attn1.processor.to_q_lora.
    old = re.sub(r"\.processor\.(to_q|to_k|to_v|to_out)_lora$", r".\1", name)
    old = re.sub(r"\.to_out$", ".to_out.0", old)
    return names.get(name) or names.get(old) or names.get(name.removeprefix("base_model.model."))


@torch.no_grad()
def _add(parts: Mapping[str, Any], lora: Lora, changes: Mapping[Layer, Change]) -> None:
    for layer, change in changes.items():
        module = parts[layer.component].get_submodule(layer.name)
        weight = module.weight
        down, up = change.down, change.up
        fits = down is not None and up is not None and up.shape[0] == weight.shape[0] and up.shape[1] == down.shape[0]
        if down is None or up is None or not fits or down[0].numel() != weight[0].numel():
            shapes = [list(one.shape) for one in (down, up) if one is not None]
            raise CheckpointError(
                f"'{lora.path}' changes '{layer.name}' by matrices of {shapes}, whose weight is {list(weight.shape)}; "
                "it is for another family."
            )
        rank = down.shape[0]
        scale = lora.scale * (change.alpha if change.alpha is not None else rank) / rank
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        module.weight = torch.nn.Parameter(weight.float() + scale * delta, requires_grad=False)
