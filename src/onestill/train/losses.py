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
        real: one tensor of logits for each head, any shape.
        fake: likewise.
    """
    return sum((F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)), torch.zeros(()))


def hinge_fake(fake: Sequence[Tensor], keep: Tensor, count: Tensor | None = None) -> Tensor:
    """The fakes' half of Eq. 3 over the samples where bool `keep` [B] is true; 0 where none is.

    Args:
        fake: logits [B, ...] for each head.
        count: by what their sum is divided; their number where these samples are all.
    """
    # A question of how many, or whether any, would be a wait for a GPU.
    count = keep.sum().clamp(min=1) if count is None else count
    each = (torch.where(keep, F.relu(1 + f).flatten(1).mean(1), 0.0).sum() for f in fake)
    return sum((total / count for total in each), torch.zeros(()))


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


def nfsd_direction(eps_text: Tensor, eps_empty: Tensor, eps_negative: Tensor, t: Tensor, scale: float) -> Tensor:
    """Noise-free score distillation's direction, delta_D + s delta_C (Katzir et al. 2023, arXiv 2310.17590, Eq. 6).

    delta_C = eps(text) - eps(empty) is where the prompt points; delta_D is what is left of the score when its noise is
    taken out: eps(empty) itself while there is little noise, t < 200, and eps(empty) - eps(negative) above.

    Args:
        eps_text: the teacher's noise under the prompt, [B, ...].
        eps_empty: under the empty prompt.
        eps_negative: under a prompt of bad quality.
        t: timesteps [B].
        scale: s, a usual guidance scale.
    """
    early = (t < 200).view(-1, *[1] * (eps_text.ndim - 1))
    delta_d = torch.where(early, eps_empty, eps_empty - eps_negative)
    return delta_d + scale * (eps_text - eps_empty)


def score_target(x_theta: Tensor, direction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The x_psi with which Eq. 4 under `sds_weight` has the gradient w(t) `direction` (App. A, read backwards).

    With `direction` = eps_hat - eps' it is the teacher's own x0. alpha and sigma broadcast against [B, ...].
    """
    return (x_theta - sigma / alpha * direction).detach()


# --- consistency distillation (Luo et al. 2023, LCM, arXiv 2310.04378) -----------------------------------------------


def boundary_scalings(t: Tensor, sigma_data: float = 0.5, scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of f(x, t) = c_skip x + c_out x0(x, t), which is x itself at t = 0 (LCM, Eq. 9 and App. C).

    Args:
        t: timesteps [B]. sigma_data, scaling: as in the released LCMs; diffusers' LCMScheduler has the same.

    Returns:
        c_skip and c_out, [B] float32 each.
    """
    at = t.float() * scaling
    root = (at.square() + sigma_data**2).sqrt()
    return sigma_data**2 / root.square(), at / root


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Mean of sqrt((x - y)^2 + c^2) - c: square near 0, absolute far away (Song and Dhariwal, arXiv 2310.14189)."""
    return ((x - y.detach()).square() + c * c).sqrt().sub(c).mean()


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of `values` [B] where bool `chosen` [B] is true; NaN, which a log leaves out, where it nowhere is."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum()


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
        image: unit embeddings [B, E].
        text: likewise.
        scale: the inverse temperature, a scalar.
        same: bool [B, B], true off the diagonal where two captions are equal.
    """
    logits = (scale * image @ text.T).masked_fill(same, float("-inf"))
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
