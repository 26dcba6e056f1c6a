"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): what the heads look at is changed at random, and gradients pass.

Heads that see only changed pictures cannot learn the real ones by heart. A real picture and the student's are changed
alike, so that no change distinguishes them. Written from the paper.

Shapes: B batch, C channels, H W height and width, of pixels or latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onestill.train.noise import Draw, table

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
        sides = table((height, width), draw.device)
        self._shift = ((draw.uniform(count, 2) * 2 - 1) * SHIFT * sides).round().long().to(device)
        self._centre = (draw.uniform(count, 2) * sides).long().to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if "colour" in self.kinds:
            x = colour(x, self._colour)
        if "translation" in self.kinds:
            x = translate(x, self._shift)
        return x * self._mask(x) if "cutout" in self.kinds else x

    def _mask(self, x: Tensor) -> Tensor:
        """[B, 1, H, W]: 0 in a rectangle of half the sides about each centre, cut at the edges; 1 elsewhere."""
        height, width = x.shape[2:]
        inside = []
        for side, centre in zip((height, width), self._centre.unbind(1), strict=True):
            half = int(side * CUT) // 2
            place = torch.arange(side, device=x.device) - centre.unsqueeze(1)  # [B, side]
            inside.append((place >= -half) & (place < half))
        rows, columns = inside
        return (~(rows.unsqueeze(2) & columns.unsqueeze(1))).unsqueeze(1).to(x.dtype)


def colour(x: Tensor, u: Tensor) -> Tensor:
    """Brightness, saturation and contrast of x [B, 3, H, W] by u [B, 3] in [0, 1]; 0.5 changes nothing."""
    brightness, saturation, contrast = (part.view(-1, 1, 1, 1) for part in u.unbind(1))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def translate(x: Tensor, shift: Tensor) -> Tensor:
    """Pictures [B, C, H, W] moved down and right by int64 `shift` [B, 2] places; what comes in is 0."""
    for axis, by in ((2, shift[:, 0]), (3, shift[:, 1])):
        side = x.shape[axis]
        source = torch.arange(side, device=x.device) - by.unsqueeze(1)  # [B, side]: where each place comes from
        shape = [len(x), 1, 1, 1]
        shape[axis] = side
        taken = x.gather(axis, source.clamp(0, side - 1).view(shape).expand_as(x))
        x = torch.where(((source >= 0) & (source < side)).view(shape), taken, 0.0)
    return x
