"""What a UNet is conditioned on: the states of a prompt's tokens, and for SDXL a pooled embedding and sizes. `[torch]`

Shapes: B batch, K tokens, D text width, P width of a pooled text embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Condition", "added_cond_kwargs", "concatenated", "native_sizes", "pool"]


@dataclass(frozen=True)
class Condition:
    """What conditions a UNet's call for B images.

    Attributes:
        text: token states [B, K, D].
        mask: bool [B, K], true where a token is not padding. The UNet attends to all K; pooling leaves padding out.
        pooled: one embedding of each prompt [B, P], for UNets that take one (SDXL); None for others.
        sizes: [B, 6] in pixels, SDXL's micro-conditioning: original height and width, crop top and left, target
            height and width. None for UNets without it.
    """

    text: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def added(self) -> dict[str, Any]:
        """The UNet's keyword arguments besides `text`: none, or SDXL's `added_cond_kwargs`."""
        return added_cond_kwargs(self.pooled, self.sizes)

    @property
    def embedding(self) -> Tensor:
        """One vector a prompt: the pooled embedding [B, P] where there is one, else the mean of its states [B, D]."""
        return pool(self.text, self.mask) if self.pooled is None else self.pooled

    def map(self, change: Callable[..., Tensor], *others: Condition) -> Condition:
        """Each tensor changed alike, together with its namesakes in `others`; None where one of them has none."""
        namesakes = zip(*(vars(one).values() for one in (self, *others)), strict=True)
        return Condition(*(None if any(part is None for part in parts) else change(*parts) for parts in namesakes))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Condition:
        """On a device; pinned memory is copied without waiting."""
        return self.map(lambda part: part.to(device, non_blocking=True))

    def cast(self, dtype: torch.dtype) -> Condition:
        """Floating-point tensors in `dtype`."""
        return self.map(lambda part: part.to(dtype) if part.is_floating_point() else part)

    def expand(self, count: int) -> Condition:
        """One prompt's condition for `count` images."""
        return self.map(lambda part: part.expand(count, *part.shape[1:]))

    def sized(self, other: Condition) -> Condition:
        """With another condition's sizes, so that a comparison is between the same images."""
        return replace(self, sizes=other.sizes)

    def where(self, chosen: Tensor, other: Condition) -> Condition:
        """`other`, of one prompt, where bool [B] is true; its own elsewhere. Sizes stay."""

        def choose(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return mine
            return torch.where(chosen.view(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        return Condition(
            choose(self.text, other.text),  # type: ignore[arg-type]
            choose(self.mask, other.mask),  # type: ignore[arg-type]
            choose(self.pooled, other.pooled),
            self.sizes,
        )


def concatenated(one: Condition, other: Condition) -> Condition:
    """Two conditions one after the other, [2B, ...]."""
    return one.map(lambda first, second: torch.cat([first, second]), other)


def added_cond_kwargs(pooled: Tensor | None, sizes: Tensor | None) -> dict[str, Any]:
    """The keyword arguments by which a UNet takes pooled embeddings [B, P] and sizes [B, 6]; none without them."""
    return {} if pooled is None else {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def pool(text: Tensor, mask: Tensor) -> Tensor:
    """Mean of the token states [B, K, D] where mask [B, K] is true: MiniLM's sentence embedding, unnormalised."""
    weight = mask.unsqueeze(-1).to(text.dtype)
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1)


def native_sizes(count: int, native_px: int) -> Tensor:
    """SDXL's micro-conditioning [B, 6] of square images that nobody cropped or scaled."""
    return torch.tensor([[native_px, native_px, 0, 0, native_px, native_px]], dtype=torch.float32).expand(count, 6)
