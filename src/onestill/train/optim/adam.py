"""AdamW as the methods use it."""

from __future__ import annotations

import torch
from torch import nn


def adamw(network: nn.Module, lr: float, beta1: float = 0.9, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW on what of `network` trains, in one fused kernel, which also skips steps on the device.

    beta2 is 0.99 and not torch's 0.999: runs here are thousands of steps long, and gradients of a game change fast.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(beta1, 0.99), weight_decay=weight_decay, fused=True)
