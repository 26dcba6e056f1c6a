"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): how different two pictures look to a network that has seen many.

The five stages of VGG16, their channels scaled to unit length at each place, the squared differences weighed by
channel and averaged over the picture. The weights come from a safetensors file; `recipes/icons/networks.py` makes one.

Shapes: B batch, H W pixels.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from onestill.errors import CheckpointError

# Channels of VGG16's convolutions, "M" a halving; a stage's features are those before its halving.
_LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
WIDTHS = (64, 128, 256, 512, 512)


class VGG16(nn.Module):
    """Pictures [B, 3, H, W] in about [-1, 1] -> features [B, WIDTHS[k], H / 2**k, W / 2**k] of the five stages."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        widths = [3, *(layer for layer in _LAYERS if isinstance(layer, int))]
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = (x - self.mean) / self.deviation
        stages: list[Tensor] = []
        convolutions = iter(self.convolutions)
        for layer in _LAYERS:
            if layer == "M":
                stages.append(x)
                x = F.max_pool2d(x, 2)
            else:
                x = F.relu(next(convolutions)(x))
        return [*stages, x]


class LPIPS(nn.Module):
    """Two batches of pictures [B, 3, H, W] in about [-1, 1] -> their distances [B]; frozen.

    H and W must be at least 16, since VGG16 halves them four times.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = VGG16()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(width)) for width in WIDTHS)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, file: str | Path) -> LPIPS:
        """The distance whose weights stand in `file`. Raises CheckpointError where they do not."""
        made = cls()
        try:
            made.load_state_dict(load_file(file))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} holds no weights of LPIPS: make it with python -m recipes.icons.networks."
            ) from error
        return made

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradients flow into y; x is what it should look like."""
        with torch.no_grad():
            wanted = [_unit(stage) for stage in self.network(x)]
        total = y.new_zeros(len(y))
        for weight, one, stage in zip(self.weights, wanted, self.network(y), strict=True):
            difference = (one - _unit(stage)).square()
            total = total + torch.einsum("bchw,c->bhw", difference, weight).flatten(1).mean(1)
        return total


def _unit(features: Tensor) -> Tensor:
    """Features [B, C, h, w] scaled to length 1 at each place."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
