"""The inverse of diffusers' converters: where a tensor of a module lies in a single file of the original key layout.

Published checkpoints name their tensors as the first training code did: `model.diffusion_model.input_blocks.4.1...`.
Tests write such files with this table, which `tests/checkpoint/test_single_file.py` compares with diffusers' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
        name: in the file, without the network's prefix.
        third: 0, 1 or 2 where it is that third of the rows of a fused q, k, v; else None.
        transposed: whether the file holds it the other way round.
    """

    name: str
    third: int | None = None
    transposed: bool = False


_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_QKV = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


def unet_place(name: str, layers: int, attention_ups: frozenset[int]) -> Place | None:
    """Where a tensor of a UNet2DConditionModel lies.

    Args:
        name: its name in the module.
        layers: `layers_per_block`.
        attention_ups: the up blocks that have attention, after which the upsampler's number depends.

    Returns:
        None for a name that the original UNet has no counterpart of.
    """
    if match := _UNET_BLOCK.fullmatch(name):
        side, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = block * (layers + 1) + (1 if side == "down" else 0)
        blocks = "input_blocks" if side == "down" else "output_blocks"
        match kind:
            case "resnets":
                return Place(f"{blocks}.{first + number}.0.{_renamed_start(rest, _UNET_RESNET)}")
            case "attentions":
                return Place(f"{blocks}.{first + number}.1.{rest}")
            case "downsamplers":
                return Place(f"{blocks}.{first + layers}.0.op.{rest.removeprefix('conv.')}")
        return Place(f"{blocks}.{first + layers}.{2 if block in attention_ups else 1}.{rest}")
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            rest = name.removeprefix(f"{ours}.")
            return Place(f"{theirs}.{_renamed_start(rest, _UNET_RESNET) if 'resnets' in ours else rest}")
    return None


def vae_place(name: str, levels: int) -> Place | None:
    """Where a tensor of an AutoencoderKL with `levels` resolutions lies; None where it has no counterpart."""
    if match := _VAE_BLOCK.fullmatch(name):
        side, block, kind, number, rest = match[1], int(match[2]), match[3], match[4], match[5]
        level = f"{side}.down.{block}" if side == "encoder" else f"{side}.up.{levels - 1 - block}"
        if kind == "resnets":
            return Place(f"{level}.block.{number}.{rest.replace('conv_shortcut', 'nin_shortcut')}")
        return Place(f"{level}.{'downsample' if side == 'encoder' else 'upsample'}.{rest}")
    if match := _VAE_MIDDLE.fullmatch(name):
        side, kind, number, rest = match[1], match[2], int(match[3]), match[4]
        if kind == "resnets":
            return Place(f"{side}.mid.block_{number + 1}.{rest}")
        return Place(f"{side}.mid.attn_{number + 1}.{_renamed_start(rest, _VAE_ATTENTION)}")
    return Place(name.replace("conv_norm_out", "norm_out"))


def open_clip_place(name: str) -> Place | None:
    """Where a tensor of OpenCLIP's text encoder lies; None where it has no counterpart."""
    ends = {
        "embeddings.token_embedding.weight": Place("token_embedding.weight"),
        "embeddings.position_embedding.weight": Place("positional_embedding"),
        "final_layer_norm.weight": Place("ln_final.weight"),
        "final_layer_norm.bias": Place("ln_final.bias"),
        "text_projection.weight": Place("text_projection", transposed=True),
    }
    if name in ends:
        return ends[name]
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = f"transformer.resblocks.{match[1]}", match[2], match[3]
    if part in _QKV:
        return Place(f"{layer}.attn.in_proj_{kind}", third=_QKV[part])
    return Place(f"{layer}.{_CLIP_LAYER[part]}.{kind}") if part in _CLIP_LAYER else None


def _renamed_start(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def place_of(layout: str, config: Mapping[str, Any], names: Mapping[str, Any]) -> Callable[[str], Place | None]:
    """The function that gives a tensor's place in a file: of a "unet", "vae", "clip" or "open_clip"."""
    match layout:
        case "unet":
            ups = frozenset(
                int(name.split(".")[1]) for name in names if name.startswith("up_blocks.") and ".attentions." in name
            )
            return partial(unet_place, layers=config["layers_per_block"], attention_ups=ups)
        case "vae":
            return partial(vae_place, levels=len(config["block_out_channels"]))
        case "open_clip":
            return lambda name: open_clip_place(name.removeprefix("text_model."))
    return lambda name: Place(f"text_model.{name.removeprefix('text_model.')}")
