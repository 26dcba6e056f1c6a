"""The discriminator's trained half: one small head on each tap of a frozen feature network (section 3.2).

A head gives a logit for each token, conditioned by projection: the inner product of the token's features with an
embedding of the caption and of the real image. Spectral norm on every layer holds the slopes down.

Shapes: B batch, N tokens on a square grid, D feature width, E condition width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class Head(nn.Module):
    """Tokens [B, N, D] and a condition [B, E] or None -> logits [B, N]."""

    def __init__(self, width: int, hidden: int, text_width: int, image_width: int) -> None:
        super().__init__()
        self.enter = spectral_norm(nn.Conv2d(width, hidden, 1))
        self.mix = spectral_norm(nn.Conv2d(hidden, hidden, 3, padding=1))
        self.norm = nn.GroupNorm(8, hidden)
        self.judge = spectral_norm(nn.Conv2d(hidden, 1, 1))
        self.text = spectral_norm(nn.Linear(text_width, hidden)) if text_width else None
        self.image = spectral_norm(nn.Linear(image_width, hidden)) if image_width else None

    def forward(self, feature: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor:
        batch, count, width = feature.shape
        side = int(count**0.5)
        x = feature.transpose(1, 2).reshape(batch, width, side, side)
        x = F.leaky_relu(self.norm(self.enter(x)), 0.2)
        x = (x + F.leaky_relu(self.mix(x), 0.2)) * 0.5**0.5  # [B, hidden, side, side]
        logits = self.judge(x).flatten(1)  # [B, N]
        for project, condition in ((self.text, text), (self.image, image)):
            if project is not None and condition is not None:
                direction = project(condition)  # [B, hidden]
                logits = logits + torch.einsum("bchw,bc->bhw", x, direction).flatten(1) * x.shape[1] ** -0.5
        return torch.Tensor.float(logits)  # the losses are computed in float32 under autocast too


class Discriminator(nn.Module):
    """A head for each tap. `text_width` or `image_width` 0 leaves that condition out."""

    def __init__(self, widths: Sequence[int], hidden: int, text_width: int, image_width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width, hidden, text_width, image_width) for width in widths)

    def forward(self, taps: Sequence[Tensor], text: Tensor | None, image: Tensor | None) -> list[Tensor]:
        """Taps [B, N_k, D_k] -> logits [B, N_k] for each head."""
        return [head(tap, text, image) for head, tap in zip(self.heads, taps, strict=True)]
