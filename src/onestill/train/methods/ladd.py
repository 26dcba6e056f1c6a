"""Latent Adversarial Diffusion Distillation (arXiv 2403.12015): ADD in latents, judged by the teacher's own features.

What differs from `add`: real and made latents are noised to a level t drawn from a logit-normal before the teacher's
encoder looks at them, and the heads are conditioned on that level; the student first practises on little noise; and
with images that the teacher itself drew, the adversarial loss is enough.

Shapes: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from onestill.errors import RecipeError
from onestill.train.discriminator import heads, inputs
from onestill.train.methods import add, add_options
from onestill.train.noise import Draw
from onestill.train.recipe import LoopOptions, option
from onestill.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class StudentInputOptions(add_options.StudentInputOptions):
    """Most weight on pure noise, after a warm-up with little noise."""

    weights: list[float] = option([0.7, 0.1, 0.1, 0.1], low=0.0, was="timestep_weights")
    warm_weights: list[float] = option([0.0, 0.0, 0.5, 0.5], low=0.0, was="warm_timestep_weights")  # in the warm-up
    warm_iterations: int = option(500, low=0)  # how long the warm-up lasts


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(inputs.FeatureOptions):
    network: str = option("teacher", choices=("teacher",), was="feature_network")


@dataclass(frozen=True, kw_only=True)
class InputOptions(inputs.InputOptions):
    """The noise under the features is t = 999 sigmoid(n), n normal; `t_low` and `t_high` are not used.

    Not quite the paper's: its sigmoid(n) is rectified flow's time, where sigma / alpha is e^n; docs/distil.md compares.
    """

    logit_mean: float = option(1.0, low=-10.0, high=10.0, was="level_mean")  # of n; higher judges structure
    logit_std: float = option(1.0, low=0.0, high=10.0, was="level_deviation")  # of n


@dataclass(frozen=True, kw_only=True)
class HeadOptions(heads.HeadOptions):
    condition_on_image: bool = option(False)  # the teacher's features have no embedding of a whole image
    condition_on_level: bool = option(True)


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(add_options.DistillationOptions):
    lambda_distill: float = option(0.0, low=0.0)  # for images that the teacher drew; 1 to 2.5 for real ones


@dataclass(frozen=True, kw_only=True)
class Options(add_options.Options):
    """ADD's tables with LADD's defaults."""

    student_input: StudentInputOptions = field(default_factory=StudentInputOptions)
    features: FeatureOptions = field(default_factory=FeatureOptions)
    discriminator_input: InputOptions = field(default_factory=InputOptions)
    heads: HeadOptions = field(default_factory=HeadOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)


class Method(add.Method):
    def __init__(self, options: Options, loop: LoopOptions) -> None:
        given = options.student_input
        if len(given.warm_weights) != len(given.timesteps):
            raise RecipeError("student_input.warm_weights needs one number for each of student_input.timesteps.")
        if given.warm_iterations and not sum(given.warm_weights) > 0:
            raise RecipeError("student_input.warm_weights are all zero: give one a weight, or warm_iterations = 0.")
        super().__init__(options, loop)

    def timestep_weights(self, state: TrainState) -> list[float]:
        """The weights of the warm-up while it lasts."""
        options = self.options.student_input
        return list(options.warm_weights if state.age("student") < options.warm_iterations else options.weights)

    def draw_levels(self, count: int, draw: Draw) -> Tensor:
        """t in 0..999 as the sigmoid of a normal, [B]."""
        options = self.options.discriminator_input
        normal = options.logit_mean + options.logit_std * draw.normal(count)
        return (torch.sigmoid(normal) * self.teacher_denoiser.last).round().long()
