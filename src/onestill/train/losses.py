"""Losses as pure functions of tensors. Equation numbers are the ADD paper's (arXiv 2311.17042).

Shapes: B batch, C channels, H W pixels (or h w latents), N tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# --- the adversarial game, Eqs. 2 and 3 ----------------------------------------------------------------------------


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Eq. 3 without R1: for each head max(0, 1 - D(x0)) + max(0, 1 + D(x_theta)), the heads' means summed.

    Args:
        real, fake: one tensor of logits for each head, any shape.
    """
    return sum((F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)), torch.zeros(()))


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """Eq. 2: minus the logits of what the student made, the heads' means summed."""
    return sum((-f.mean() for f in fake), torch.zeros(()))


def r1(features: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """R1 on the *inputs of the heads* (section 3.2): E ||d D_k / d F_k||^2, summed over heads, no factor one half.

    A sample's D_k is the mean of its logits, as in the hinge. Nothing flows into the feature network: `features`
    [B, N, D] must be leaves that require a gradient, and `logits` [B, ...] come from them; a head that ignores its
    input costs nothing.
    """
    penalty = torch.zeros(())
    for feature, logit in zip(features, logits, strict=True):
        total = logit.flatten(1).mean(1).sum()
        if not total.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(total, feature, create_graph=True, materialize_grads=True)
        penalty = penalty + gradient.flatten(1).square().sum(1).mean()
    return penalty


# --- distillation, Eq. 4 -------------------------------------------------------------------------------------------


def distillation(x_theta: Tensor, x_psi: Tensor, weight: Tensor) -> Tensor:
    """Eq. 4: E[c(t) ||x_theta - sg(x_psi)||^2], the norm taken as the mean over a sample's elements.

    Args:
        x_theta: what the student made, [B, ...]. x_psi: the teacher's target, the same shape, no gradient.
        weight: c(t), [B].
    """
    error = (x_theta - x_psi.detach()).square().flatten(1).mean(1)  # [B]
    return (weight * error).mean()


def exponential_weight(alpha: Tensor) -> Tensor:
    """c(t) = alpha_t, the paper's default: noisy targets count less."""
    return alpha


def sds_weight(alpha: Tensor, sigma: Tensor, w: Tensor | float = 1.0) -> Tensor:
    """c(t) = alpha_t / (2 sigma_t) w(t), which makes the gradient that of score distillation sampling (App. A)."""
    return alpha / (2 * sigma) * w


# --- diffusion -----------------------------------------------------------------------------------------------------


def min_snr_weight(snr: Tensor, gamma: float) -> Tensor:
    """Weight of the v-prediction error, min(SNR, gamma) / (SNR + 1) (Hang et al., 2303.09556, for v)."""
    return snr.clamp(max=gamma) / (snr + 1)


# --- autoencoder ---------------------------------------------------------------------------------------------------


def gradient_difference(x: Tensor, y: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of the horizontal and vertical image gradients, over `scales` halvings. [B, C, H, W]."""
    total = torch.zeros((), device=x.device)
    for scale in range(scales):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        error = x - y
        total = total + (error[..., 1:] - error[..., :-1]).abs().mean()
        total = total + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return total / scales


def unit_moments(latents: Tensor) -> Tensor:
    """KL divergence to N(0, 1) of a Gaussian with each channel's mean and variance over the batch: 0 when unit.

    Args:
        latents: [B, C, h, w].
    """
    values = latents.transpose(0, 1).flatten(1)  # [C, B*h*w]
    mean, variance = values.mean(1), values.var(1, unbiased=False).clamp(min=1e-6)
    return 0.5 * (mean.square() + variance - 1 - variance.log()).mean()


# --- contrast ------------------------------------------------------------------------------------------------------


def info_nce(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric contrastive loss; pairs with the same caption are no negatives of each other.

    Args:
        image, text: unit embeddings [B, E]. scale: the inverse temperature, a scalar.
        same: bool [B, B], true off the diagonal where two captions are equal.
    """
    logits = (scale * image @ text.T).masked_fill(same, float("-inf"))
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
