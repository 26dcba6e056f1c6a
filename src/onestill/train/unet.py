"""A new UNet for training: its options in a recipe and its random weights.

Shapes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from onestill.errors import DataError, RecipeError
from onestill.networks.condition import Condition
from onestill.train.recipe import option


@dataclass(frozen=True, kw_only=True)
class UNetOptions:
    """diffusers' names for the UNet; `attention` says at which levels, fine to coarse, there is cross-attention.

    `text_in_time` adds the prompt as a whole, pooled by attention, to the embedding of the timestep, so that it acts at
    every resolution and not only where there is cross-attention.
    """

    sample_size: int = option(8, low=2)
    channels: int = option(16, low=1)
    block_out_channels: list[int] = option([128, 256], low=8)
    attention: list[bool] = option([False, True])
    layers_per_block: int = option(1, low=1, high=8)
    head_dim: int = option(32, low=1)
    groups: int = option(16, low=1)
    text_width: int = option(384, low=1)
    text_in_time: bool = option(False)


def build_unet(options: UNetOptions) -> UNet2DConditionModel:
    """A UNet with random weights. Raises RecipeError for sizes that do not fit together."""
    if len(options.attention) != len(options.block_out_channels):
        raise RecipeError("unet.attention needs one true or false for each of unet.block_out_channels.")
    for name, divisor in (("head_dim", options.head_dim), ("groups", options.groups)):
        if any(width % divisor for width in options.block_out_channels):
            raise RecipeError(f"unet.{name} = {divisor} does not divide each of unet.block_out_channels.")
    down = tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in options.attention)
    up = tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(options.attention))
    return UNet2DConditionModel(
        sample_size=options.sample_size,
        in_channels=options.channels,
        out_channels=options.channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=tuple(options.block_out_channels),
        layers_per_block=options.layers_per_block,
        # diffusers' name is a misnomer that it keeps for its old files: for UNets it counts heads.
        attention_head_dim=tuple(width // options.head_dim for width in options.block_out_channels),
        norm_num_groups=options.groups,
        cross_attention_dim=options.text_width,
        addition_embed_type="text" if options.text_in_time else None,
        addition_embed_type_num_heads=max(1, options.text_width // 64),
    )


def check_cached(unet: Any, x0: Tensor, condition: Condition) -> None:
    """Raise DataError where a UNet cannot take cached latents [B, C, h, w] or the condition cached with them."""
    config = unet.config
    there, taken = (x0.shape[1], condition.text.shape[-1]), (config["in_channels"], config["cross_attention_dim"])
    if there != taken:
        raise DataError(
            f"these shards were cached for another model: their latents have {there[0]} channels and their text is "
            f"{there[1]} wide, and the UNet takes {taken[0]} and {taken[1]}; cache them with this model's parts."
        )
    if config.get("addition_embed_type") == "text_time" and condition.pooled is None:
        raise DataError(
            "these shards were cached for another model: they hold no 'pooled', which the UNet takes; "
            "cache them with this model's parts."
        )
