"""Latent Adversarial Diffusion Distillation (arXiv 2403.12015): ADD in latents, judged by the teacher's own features.

What differs from `add`: real and made latents are noised to a level t drawn from a logit-normal before the teacher's
encoder looks at them, and the heads are told that level; the student first practises on little noise; and with images
that the teacher itself drew, the adversarial loss is enough.

Shapes: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onestill.errors import RecipeError
from onestill.train.methods import add
from onestill.train.noise import Draw
from onestill.train.recipe import LoopOptions, option
from onestill.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Options(add.Options):
    """`level_mean` and `level_deviation` are the logit-normal's: higher means judge structure, lower ones texture.

    In the first `warm_iterations`, `warm_timestep_weights` stand in for `timestep_weights`.
    """

    feature_network: str = option("teacher", choices=("teacher",))
    condition_on_image: bool = option(False)
    condition_on_level: bool = option(True)
    lambda_distill: float = option(0.0, low=0.0)
    timestep_weights: list[float] = option([0.7, 0.1, 0.1, 0.1], low=0.0)
    warm_timestep_weights: list[float] = option([0.0, 0.0, 0.5, 0.5], low=0.0)
    warm_iterations: int = option(500, low=0)
    level_mean: float = option(1.0, low=-10.0, high=10.0)
    level_deviation: float = option(1.0, low=0.0, high=10.0)


class Method(add.Method):
    def __init__(self, options: Options, loop: LoopOptions) -> None:
        if len(options.warm_timestep_weights) != len(options.student_timesteps):
            raise RecipeError("warm_timestep_weights needs one number for each of student_timesteps.")
        if options.warm_iterations and not sum(options.warm_timestep_weights) > 0:
            raise RecipeError("warm_timestep_weights are all zero: give one a weight, or set warm_iterations to 0.")
        super().__init__(options, loop)

    def timestep_weights(self, state: TrainState) -> list[float]:
        """The weights of the warm-up while it lasts."""
        warm = state.iteration < self.options.warm_iterations
        return list(self.options.warm_timestep_weights) if warm else super().timestep_weights(state)

    def draw_levels(self, count: int, draw: Draw) -> Tensor:
        """t in 0..999 as the sigmoid of a normal, [B]."""
        normal = self.options.level_mean + self.options.level_deviation * draw.normal(count)
        return (torch.sigmoid(normal) * self.teacher_denoiser.last).round().long()
