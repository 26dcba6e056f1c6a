"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): what the heads look at is changed at random, and gradients pass.

Heads that see only changed pictures cannot learn the real ones by heart. A real picture and the student's are changed
alike, so that no change tells them apart. Written from the paper.

Shapes: B batch, C channels, H W height and width, of pixels or latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onestill.train.draw import Draw

KINDS = ("colour", "translation", "cutout")
SHIFT, CUT = 0.125, 0.5  # shares of the side, as in the paper


class Augmentation:
    """One draw of changes for B pictures; called on any two batches of that size, it changes both alike.

    Args:
        kinds: some of `KINDS`. "colour" means nothing in latents.
        size: (H, W) of what will be changed.
    """

    def __init__(self, kinds: Sequence[str], count: int, size: tuple[int, int], draw: Draw, device: torch.device):
        self.kinds = kinds
        height, width = size
        self._colour = draw.uniform(count, 3).to(device)
        self._shift = ((draw.uniform(count, 2) * 2 - 1) * SHIFT * torch.tensor([height, width])).round().long().tolist()
        self._centre = (draw.uniform(count, 2) * torch.tensor([height, width])).long().tolist()

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if "colour" in self.kinds:
            x = colour(x, self._colour)
        if "translation" in self.kinds:
            x = torch.stack([translate(one, *shift) for one, shift in zip(x, self._shift, strict=True)])
        return x * self._mask(x) if "cutout" in self.kinds else x

    def _mask(self, x: Tensor) -> Tensor:
        """[B, 1, H, W]: 0 in a rectangle of half the sides about each centre, cut at the edges; 1 elsewhere."""
        height, width = x.shape[2:]
        high, wide = int(height * CUT) // 2, int(width * CUT) // 2
        mask = torch.ones(len(x), 1, height, width, device=x.device, dtype=x.dtype)
        for one, (row, column) in zip(mask, self._centre, strict=True):
            one[:, max(row - high, 0) : row + high, max(column - wide, 0) : column + wide] = 0
        return mask


def colour(x: Tensor, u: Tensor) -> Tensor:
    """Brightness, saturation and contrast of x [B, 3, H, W] by u [B, 3] in [0, 1]; 0.5 changes nothing."""
    brightness, saturation, contrast = (part.view(-1, 1, 1, 1) for part in u.unbind(1))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def translate(x: Tensor, down: int, right: int) -> Tensor:
    """[C, H, W] moved by whole places; what comes in is 0."""
    moved = torch.roll(x, (down, right), (1, 2))
    keep = torch.ones_like(moved[:1])
    keep[:, : max(down, 0)] = 0
    keep[:, :, : max(right, 0)] = 0
    if down < 0:
        keep[:, down:] = 0
    if right < 0:
        keep[:, :, right:] = 0
    return moved * keep
