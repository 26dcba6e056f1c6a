"""Eight Gaussians on a circle, drawn in one step: ADD's own step and loop, with a teacher that is exact.

The latents are points [B, 2, 1, 1]; the teacher knows the posterior mean; the features are frozen random Fourier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onestill.networks.condition import Condition
from onestill.networks.denoiser import Denoiser, training_schedule
from onestill.train.discriminator.heads import Discriminator
from onestill.train.discriminator.inputs import DiscriminatorInputs
from onestill.train.loop import train
from onestill.train.methods.add import Method
from onestill.train.recipe import LoopOptions, Recipe, parse_recipe
from onestill.train.state import TrainState
from tests.train.parts import nested

MODES = torch.stack([torch.tensor([np.cos(a), np.sin(a)]) for a in np.arange(8) * np.pi / 4]).float() * 2**0.5
SPREAD = 0.06
SCHEDULE = training_schedule()
NOTHING = Condition(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
ALPHA, SIGMA = (torch.tensor(values, dtype=torch.float32) for values in (SCHEDULE.alpha, SCHEDULE.sigma))


def points(count: int, draw: torch.Generator) -> Tensor:
    """`count` points of the eight Gaussians, [B, 2]."""
    return MODES[torch.randint(0, 8, (count,), generator=draw)] + SPREAD * torch.randn(count, 2, generator=draw)


class ExactTeacher(nn.Module):
    """The v of the eight Gaussians' posterior mean."""

    config: ClassVar = {"in_channels": 2, "cross_attention_dim": 1}

    def forward(self, x: Tensor, timesteps: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        alpha, sigma = ALPHA[timesteps].view(-1, 1), SIGMA[timesteps].view(-1, 1)
        flat = x.flatten(1)
        variance = alpha.square() * SPREAD**2 + sigma.square()  # [B, 1]
        away = flat.unsqueeze(1) - alpha.unsqueeze(1) * MODES  # [B, 8, 2]
        share = (-away.square().sum(-1) / (2 * variance)).softmax(-1).unsqueeze(-1)
        mean = (share * (MODES + (alpha * SPREAD**2 / variance).unsqueeze(1) * away)).sum(1)
        return (((alpha * flat - mean) / sigma).view_as(x),)


class PointStudent(nn.Module):
    """A small network of points and timesteps."""

    def __init__(self) -> None:
        super().__init__()
        widths = (4, 128, 128, 128)
        hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], 2))

    def forward(self, x: Tensor, timesteps: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        signal = torch.stack([ALPHA[timesteps], SIGMA[timesteps]], 1)
        return (self.layers(torch.cat([x.flatten(1), signal], 1)).view_as(x),)


class FourierFeatures:
    """Random, frozen: one feature of one token, waves of two scales."""

    widths, embedding_width = (64,), 64

    def __init__(self) -> None:
        scales = torch.tensor([0.7, 2.0]).repeat(16)
        self.frequencies = scales * torch.randn(2, 32, generator=torch.Generator().manual_seed(5))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> FourierFeatures:
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        waves = x.flatten(1) @ self.frequencies
        return [torch.cat([waves.sin(), waves.cos()], 1).unsqueeze(1) * 2**0.5]

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x)[0].squeeze(1)


class FourierInputs(DiscriminatorInputs):
    """Inputs with these features in the place of a network from a folder."""

    def __init__(self, options: Any, space: Any) -> None:
        self.feature_options, self.options, self.space = options.features, options.discriminator_input, space
        self.networks, self.image_encoder = [FourierFeatures()], FourierFeatures()
        self.levels = lambda count, draw: draw.integers(0, 0, count)


class ToyMethod(Method):
    """ADD itself; only the networks are put in by hand instead of read from folders."""

    def __init__(self, options: Any, loop: LoopOptions) -> None:
        torch.manual_seed(loop.seed)
        self.options, self.loop = options, loop
        self.student, self.teacher = PointStudent(), ExactTeacher()
        self.space: Any = None
        self.student_denoiser, self.teacher_denoiser = (
            Denoiser(self.student, SCHEDULE),
            Denoiser(self.teacher, SCHEDULE),
        )
        self.inputs = FourierInputs(options, self.space)
        self.head_text_encoder, self.native_px = None, 0
        self.discriminator = self.heads = Discriminator((64,), options.heads.width, 0, 0)
        self.networks = {"student": self.student, "discriminator": self.discriminator}
        rates = {"student": options.lr, "discriminator": options.heads.lr}
        self.optimizers = {
            role: torch.optim.AdamW(network.parameters(), lr=rates[role], betas=(0.0, 0.99), fused=True)
            for role, network in self.networks.items()
        }
        self.empty = self.negative = NOTHING

    def to(self, device: torch.device) -> None:
        pass

    def sheet(self, state: TrainState) -> tuple[NDArray[np.uint8], list[str], dict[str, float]]:
        return np.zeros((1, 8, 8, 3), np.uint8), ["points"], {}

    def export(self, state: TrainState, folder: Path) -> None:
        folder.mkdir()


class PointBatches:
    def __init__(self, size: int) -> None:
        self.draw, self.size = torch.Generator().manual_seed(0), size

    def next(self) -> dict[str, Any]:
        text = torch.zeros(self.size, 1, 1)
        return {"latents": points(self.size, self.draw).view(-1, 2, 1, 1), "text": text, "mask": text[..., 0].bool()}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


def toy_recipe(out: Path, iterations: int) -> Recipe:
    add = {
        "heads__condition_on_text": False,
        "heads__condition_on_image": False,
        "discriminator_input__shift": 0,
        "heads__width": 64,
    }
    add |= {
        "lr": 1e-3,
        "heads__lr": 5e-3,
        "student_input__weights": [3.0, 1.0, 1.0, 1.0],
        "distillation__lambda_distill": 2.5,
    }
    loop = {"iterations": iterations, "batch_size": 128, "ema_decay": 0.99, "warmup": 0, "grad_clip": 10.0}
    loop |= {"log_every": 100, "sheet_every": 9999, "checkpoint_every": 9999}
    return parse_recipe({"name": "toy", "method": "add", "out": str(out), "loop": loop, "add": nested(add)})


def one_step(method: ToyMethod, state: TrainState, count: int = 1000) -> Tensor:
    """Points [B, 2] drawn by the averaged student in one step, from noise alone."""
    student = PointStudent()
    student.load_state_dict(state.averaged("student"))
    noise = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return Denoiser(student, SCHEDULE).x0(noise, torch.full((count,), 999), NOTHING).flatten(1)


def energy_distance(x: Tensor, y: Tensor) -> float:
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def test_the_exact_teacher_is_exact() -> None:
    """Its x0 minimises the error: no constant shift or scale of it does better, and it is unbiased."""
    draw = torch.Generator().manual_seed(1)
    x0, t = points(20_000, draw).view(-1, 2, 1, 1), torch.randint(20, 981, (20_000,), generator=draw)
    alpha, sigma = ALPHA[t].view(-1, 1, 1, 1), SIGMA[t].view(-1, 1, 1, 1)
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=draw)
    mean = Denoiser(ExactTeacher(), SCHEDULE).x0(x_t, t, NOTHING)
    error = x0 - mean
    assert float(error.mean()) == pytest.approx(0, abs=0.02)
    assert float((error * mean).mean()) == pytest.approx(0, abs=0.02)  # orthogonal to every function of x_t
    assert float((error * x_t).mean()) == pytest.approx(0, abs=0.02)


@pytest.mark.slow
def test_one_step_reaches_all_eight_modes(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = toy_recipe(tmp_path, 600)
    method = ToyMethod(recipe.options, recipe.loop)
    data = points(1000, torch.Generator().manual_seed(3))
    untrained = PointStudent()
    start = Denoiser(untrained, SCHEDULE).x0(torch.randn(1000, 2, 1, 1), torch.full((1000,), 999), NOTHING)
    state = train(recipe, method, PointBatches(recipe.loop.batch_size))
    drawn = one_step(method, state)
    distance, mode = torch.cdist(drawn, MODES).min(1)
    shares = mode[distance < 0.35].bincount(minlength=8) / len(drawn)
    before, after = energy_distance(start.detach().flatten(1), data), energy_distance(drawn, data)
    print(f"energy distance {before:.3f} -> {after:.4f}, distance to a mode {distance.mean():.3f}, shares {shares}")
    assert shares.min() > 0.02, shares
    assert after < 0.1
    assert before > 0.5
    assert distance.mean() < 0.35
