"""An image tower that shares a space with text: eyes for the discriminator, features for FID, two sides for CLIP score.

The text side is a frozen sentence encoder (MiniLM) with one trained projection; the image side is trained from scratch
on pictures, or on latents where the discriminator looks at latents. Pairs with equal captions are no negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onestill.errors import DataError
from onestill.networks.contrastive import ContrastiveModel, new_backbone
from onestill.train.losses import info_nce
from onestill.train.optim.step import Batch, Objectives
from onestill.train.recipe import LoopOptions, option
from onestill.train.runtime.parallel import is_main
from onestill.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Options:
    """`space` says what the tower looks at; `channels`, `size` and `patch` describe that input."""

    space: str = option("pixels", choices=("pixels", "latents"))
    backbone: str = option("resnet", choices=("resnet", "vit"))
    channels: int = option(3, low=1)
    size: int = option(128, low=4)
    patch: int = option(16, low=1)
    width: int = option(256, low=16)
    depth: int = option(2, low=1)
    embedding_width: int = option(128, low=8)
    text_width: int = option(384, low=1)
    lr: float = option(1e-3, low=0.0, high=1.0)
    weight_decay: float = option(0.05, low=0.0)
    shift: int = option(0, low=0)
    noise: float = option(0.0, low=0.0)


class Method:
    averaged: tuple[str, ...] = ("tower",)
    batch = "latents"
    splits = False

    def __init__(self, options: Options, loop: LoopOptions) -> None:
        torch.manual_seed(loop.seed)
        self.options, self.loop = options, loop
        self.tower = build(options)
        self.networks: dict[str, nn.Module] = {"tower": self.tower}
        optimizer = torch.optim.AdamW(
            self.tower.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {"tower": optimizer}
        self._shown: tuple[Tensor, Tensor, list[str]] | None = None

    def to(self, device: torch.device) -> None:
        # oneDNN's AVX2 kernels end the process in the backward of ResNet's strided 1x1 convolutions where those have
        # fewer than 8 channels, an eighth of the width, and lie channels last.
        layout = torch.channels_last if self.options.width >= 64 else torch.contiguous_format
        self.tower.to(device, memory_format=layout)  # type: ignore[call-overload]

    def step(self, state: TrainState, batch: Batch) -> Objectives:
        tower, options = self.tower, self.options
        device = tower.logit_scale.device
        shown = "images" if options.space == "pixels" else "latents"
        if shown not in batch:
            raise DataError("a contrastive tower for pixels needs the pictures: set data.images = true.")
        x = batch[shown].to(device)  # [B, C, H, W]
        text, mask = batch["text"].to(device), batch["mask"].to(device)
        if (x.shape[1], text.shape[-1]) != (options.channels, options.text_width):
            raise DataError(
                f"the shards' {shown} have {x.shape[1]} channels and their text is {text.shape[-1]} wide: "
                "set contrastive.channels and contrastive.text_width to that."
            )
        if options.shift:
            dx, dy = state.draw.shared(-options.shift, options.shift, 2)
            x = torch.roll(x, (dy, dx), (2, 3))
        if options.noise:
            x = x + options.noise * state.draw.normal(*x.shape).to(device)
        tower.train()
        image, caption = tower.embed_image(x), tower.embed_text(text, mask)  # [B, E] each
        same = same_captions(batch["captions"]).to(device, non_blocking=True)
        loss = info_nce(image, caption, tower.logit_scale.exp().clamp(max=100), same)
        with torch.no_grad():
            right = (image @ caption.T).masked_fill(same, -2.0).argmax(1) == torch.arange(len(x), device=device)
        yield "tower", loss, {"loss": loss, "retrieval": right.float().mean(), "scale": tower.logit_scale.exp()}

    def sheet(self, state: TrainState) -> tuple[NDArray[np.uint8], list[str]]:
        """There is nothing to look at but numbers: one grey square says so."""
        return np.full((1, 32, 32, 3), 128, np.uint8), ["see metrics.jsonl"]

    def export(self, state: TrainState, folder: Path) -> None:
        tower = build(self.options)
        tower.load_state_dict({k: v.cpu() for k, v in state.averaged("tower").items()})
        if is_main():
            tower.save(folder)


def build(options: Options) -> ContrastiveModel:
    """The tower that `options` describe, with random weights."""
    sizes = dict(channels=options.channels, size=options.size, patch=options.patch, width=options.width)
    backbone = new_backbone(options.backbone, depth=options.depth, **sizes)
    facts = dict(space=options.space, image_size=options.size, channels=options.channels)
    return ContrastiveModel(backbone, options.embedding_width, options.text_width, facts)


def same_captions(captions: list[str]) -> Tensor:
    """bool [B, B], true off the diagonal where two captions are equal."""
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    which = torch.tensor([number[caption] for caption in captions])
    return (which[:, None] == which[None, :]) & ~torch.eye(len(which), dtype=torch.bool)
