"""Muon (Jordan et al. 2024): momentum whose matrices are made nearly orthogonal before they are added.

An update of Muon moves every direction of a weight matrix by about as much, where Adam's moves a few directions far.
It is for the matrices and convolutions inside a network; the first and the last layer, norms, biases and embeddings
are AdamW's. The scale of its steps is that of AdamW's, after Moonlight (arXiv 2502.16982).

Shapes: M matrices of one shape, R rows (what a layer puts out), K columns (what goes into one of them).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that takes singular values to about 1 fastest
SCALE = 0.2  # root mean square of an update of AdamW, as measured


class Muon(torch.optim.Optimizer):
    """Weights of two dimensions or more; all but the first are flattened.

    As torch's fused optimizers do, it leaves all as it is where its attribute `found_inf`, a tensor, is 1.

    Args:
        parameters: the weights.
        lr: learning rate; a step is as long as AdamW's at the same rate.
        momentum: share of the running mean of gradients that stays; Nesterov's look ahead is always on.
        weight_decay: decoupled, times `lr`.
        iterations: Newton-Schulz steps.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 5e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        iterations: int = 5,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient. `closure`, which makes gradients again, is not taken."""
        if closure is not None:
            raise TypeError("Muon takes no closure")
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for p in weights:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            means = [self.state[p]["momentum_buffer"] for p in weights]
            if (bad := getattr(self, "found_inf", None)) is None:
                self._step(group, weights, [p.grad for p in weights], means, None)
            else:
                skip = bad > 0
                finite = [torch.where(skip, 0.0, p.grad) for p in weights]
                self._step(group, weights, finite, means, 1 - bad)

    def _step(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Any],
        means: list[Tensor],
        good: Tensor | None,
    ) -> None:
        """One step; where `good` is a 0, all stays as it is."""
        momentum, decay = group["momentum"], group["lr"] * group["weight_decay"]
        if good is None:
            torch._foreach_lerp_(means, gradients, 1 - momentum)
        else:  # the same, with nothing where the gradient is nothing
            torch._foreach_mul_(means, 1 - (1 - momentum) * good)
            torch._foreach_add_(means, gradients, alpha=1 - momentum)
        updates = orthogonal(torch._foreach_lerp(gradients, means, momentum), group["iterations"])
        if good is not None:
            torch._foreach_mul_(updates, good)
        torch._foreach_mul_(weights, 1 - decay if good is None else 1 - decay * good)
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


class Together(torch.optim.Optimizer):
    """Several optimizers as one: each steps its own groups, in one step and in one state."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        super().__init__([group for member in members for group in member.param_groups], {})
        self._members = [(member, len(member.param_groups)) for member in members]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """A step of each. `closure` is not taken."""
        if closure is not None:
            raise TypeError("Together takes no closure")
        start = 0
        for member, count in self._members:
            # Lent anew each time: loading a state puts other groups and other slots in their place.
            member.param_groups, member.state = self.param_groups[start : start + count], self.state
            member.found_inf = getattr(self, "found_inf", None)  # type: ignore[attr-defined]
            member.step()
            start += count


def muon_with_adamw(
    network: nn.Module, *, muon_lr: float, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Muon at `muon_lr` for what of `network` is inside it and trains, AdamW at `lr` for the rest."""
    inner = hidden_weights(network)
    mine = {id(p) for p in inner}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in mine]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    return Together(Muon(inner, lr=muon_lr, weight_decay=weight_decay), adamw)


def hidden_weights(network: nn.Module, ends: Sequence[str] = ("conv_in", "conv_out")) -> list[nn.Parameter]:
    """The weights of linear layers and convolutions of `network` that train, without its layers named `ends`."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = (layer for name, layer in network.named_modules() if isinstance(layer, kinds) and name not in ends)
    return [weight for layer in layers if (weight := layer.get_parameter("weight")).requires_grad]


def orthogonal(tensors: Sequence[Tensor], iterations: int = 5) -> list[Tensor]:
    """Each tensor [R, ...] as the nearly orthogonal matrix [R, K] of its directions, scaled to an update of AdamW.

    On a GPU, matrices of one shape go together: there are a hundred of them, and each by itself is a dozen small
    kernels. A CPU is as fast one by one, and needs no memory to put them side by side.
    """
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        matrix = tensor.flatten(1)
        alike[(matrix.shape, tensor.device, i if tensor.device.type == "cpu" else -1)].append(i)
    made: list[Tensor] = list(tensors)
    for members in alike.values():
        stacked = torch.stack([tensors[i].flatten(1) for i in members])
        scale = SCALE * max(stacked.shape[1:]) ** 0.5
        for i, matrix in zip(members, newton_schulz(stacked, iterations).mul_(scale).unbind(), strict=True):
            made[i] = matrix.view(tensors[i].shape)
    return made


def newton_schulz(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Matrices [M, R, K] with their singular values taken to between 0.7 and 1.2; small ones need more `iterations`."""
    x = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller of the two squares
    x = _through_squares(x, iterations) if x.shape[2] >= 2 * x.shape[1] else _plain(x, iterations)
    return x.mT if tall else x


def _plain(x: Tensor, iterations: int) -> Tensor:
    """Each iteration makes a x + (b x x' + c (x x')^2) x of x [M, R, K]."""
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return x


def _through_squares(x: Tensor, iterations: int) -> Tensor:
    """The same by way of the squares [M, R, R] alone, which takes a third of the work where K is large.

    With p = a + b s + c s^2 of the square s, x becomes p x and s becomes p s p: x waits until all factors are there.
    """
    a, b, c = COEFFICIENTS
    square, product = x @ x.mT, None
    unit = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c) + a * unit
        square = factor @ square @ factor
        product = factor if product is None else factor @ product
    return x if product is None else product @ x
