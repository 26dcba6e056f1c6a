"""The discriminator's trained half: one small head on each feature of a frozen network (section 3.2).

A head gives a logit for each token, conditioned by projection: the inner product of the token's features with an
embedding of the caption, of the real image and, where the features are of noised latents (LADD), of the noise level.
Spectral norm on every layer holds the slopes down.

Shapes: B batch, N tokens, D feature width, E condition width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from onestill.train.recipe import option

LEVEL_WIDTH = 64  # of a noise level's embedding


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The heads D_k of section 3.2, and what they are conditioned on."""

    width: int = option(128, low=8, was="head_width")  # channels inside a head; not stated
    blocks: int = option(1, low=1, high=8, was="head_blocks")  # residual 3x3 convolutions; StyleGAN-T's head has one
    lr: float = option(2e-4, low=0.0, high=1.0, was="discriminator_lr")  # not stated; others: 1 to 10 times lr
    condition_on_text: bool = option(True)  # c_text: FID 21.2 to 20.6 with both, Table 1b
    condition_on_image: bool = option(True)  # c_img: below t = 999 the student saw part of x0
    condition_on_level: bool = option(False)  # the noise under the teacher's features; LADD's
    # at t = 999 the student saw nothing of x0, and matching it would reward chance; not stated
    drop_image_at_terminal: bool = option(True)
    # whose embedding is c_text: CLIP ViT-g's in the paper; "" is the model's own text encoder
    text_encoder: str = option("", was="head_text_encoder")


@dataclass(frozen=True)
class HeadCondition:
    """What the heads are conditioned on: embeddings of the captions, the real images, the noise levels.

    Each is [B, E] with an E of its own, or None.
    """

    text: Tensor | None = None
    image: Tensor | None = None
    level: Tensor | None = None


class Head(nn.Module):
    """Tokens and a condition -> logits [B, N]. A width of 0 leaves that part of the condition out.

    The tokens are [B, N, D] on a square grid, or [B, h, w, D].

    `blocks` residual convolutions of 3x3 stand between the tokens and the logits: each lets a logit see one place more
    in every direction.
    """

    def __init__(
        self, width: int, hidden: int, text_width: int, image_width: int, level_width: int = 0, blocks: int = 1
    ) -> None:
        super().__init__()
        self.enter = spectral_norm(nn.Conv2d(width, hidden, 1))
        self.mix = nn.ModuleList(spectral_norm(nn.Conv2d(hidden, hidden, 3, padding=1)) for _ in range(blocks))
        self.norm = nn.GroupNorm(8, hidden)
        self.judge = spectral_norm(nn.Conv2d(hidden, 1, 1))
        self.text = spectral_norm(nn.Linear(text_width, hidden)) if text_width else None
        self.image = spectral_norm(nn.Linear(image_width, hidden)) if image_width else None
        self.level = spectral_norm(nn.Linear(level_width, hidden)) if level_width else None

    def forward(self, feature: Tensor, condition: HeadCondition) -> Tensor:
        side = int(feature.shape[1] ** 0.5)
        grid = feature if feature.ndim == 4 else feature.reshape(len(feature), side, side, -1)
        x = grid.permute(0, 3, 1, 2).contiguous()  # [B, D, h, w]
        x = F.leaky_relu(self.norm(self.enter(x)), 0.2)
        for mix in self.mix:
            x = (x + F.leaky_relu(mix(x), 0.2)) * 0.5**0.5  # [B, hidden, h, w]
        logits = self.judge(x).flatten(1)  # [B, N]
        parts = ((self.text, condition.text), (self.image, condition.image), (self.level, condition.level))
        for project, part in parts:
            if project is not None and part is not None:
                direction = project(part)  # [B, hidden]
                logits = logits + torch.einsum("bchw,bc->bhw", x, direction).flatten(1) * x.shape[1] ** -0.5
        return torch.Tensor.float(logits)  # the losses are computed in float32 under autocast too


class Discriminator(nn.Module):
    """A head for each feature. `text_width`, `image_width` or `level_width` 0 leaves that part of the condition out."""

    def __init__(
        self,
        widths: Sequence[int],
        hidden: int,
        text_width: int,
        image_width: int,
        level_width: int = 0,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            Head(width, hidden, text_width, image_width, level_width, blocks) for width in widths
        )

    def forward(self, features: Sequence[Tensor], condition: HeadCondition) -> list[Tensor]:
        """Features [B, N_k, D_k] -> logits [B, N_k] for each head."""
        return [head(feature, condition) for head, feature in zip(self.heads, features, strict=True)]


def level_embedding(timesteps: Tensor) -> Tensor:
    """Sines and cosines of noise levels [B] in 0..999 -> [B, LEVEL_WIDTH], as a UNet embeds its timestep."""
    half = LEVEL_WIDTH // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float().unsqueeze(1) * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def mean_logits(real: Sequence[Tensor], fake: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean logits, over all heads and for each."""
    found: dict[str, Tensor] = {}
    for name, logits in (("real_logits", real), ("fake_logits", fake)):
        found[name] = torch.cat([one.detach().flatten() for one in logits]).mean()
        found |= {f"{name}/{k}": one.detach().mean() for k, one in enumerate(logits)}
    return found


class PatchDiscriminator(nn.Module):
    """[B, 3, H, W] -> what each layer makes of it, last the logits [B, 1, H/8, W/8] of patches of some 40 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                spectral_norm(nn.Conv2d(3, width, 4, 2, 1)),
                spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)),
                spectral_norm(nn.Conv2d(2 * width, 4 * width, 4, 2, 1)),
                spectral_norm(nn.Conv2d(4 * width, 1, 3, 1, 1)),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        made = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.2)
            made.append(x)
        return [*made, self.layers[-1](x)]
