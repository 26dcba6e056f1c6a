"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378): the rival that asks the teacher for each step.

A noised real latent x_{t+k} and the same latent one DDIM step of the guided teacher further down, x_t, lie on one path;
the student's f must map both to the same x0. f at x_t is the averaged student's, or the student's own without
gradient. A full student is conditioned on the teacher's guidance scale; a LoRA learns one scale, LCM-LoRA's way
(arXiv 2311.05556).

Shapes: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onestill.errors import RecipeError
from onestill.schedule import add_noise
from onestill.train.losses import boundary_scalings, pseudo_huber
from onestill.train.methods.distiller import Distiller, DistilOptions
from onestill.train.optim.adam import adamw
from onestill.train.optim.step import Batch, Objectives
from onestill.train.recipe import LoopOptions, option
from onestill.train.state import TrainState

EMBEDDING = 256  # of the guidance scale; what diffusers' pipelines make


@dataclass(frozen=True, kw_only=True)
class Options(DistilOptions):
    """LCM's own names; section and equation numbers are its paper's."""

    ddim_steps: int = option(50, low=1, high=1000)  # how finely the teacher's path is cut: k = 20 timesteps at a time
    guidance_low: float = option(3.0, low=1.0, high=50.0)  # the guidance scale is uniform between these
    guidance_high: float = option(15.0, low=1.0, high=50.0)
    embed_guidance: bool = option(True)  # the student is conditioned on the scale; an adapter cannot be
    sheet_guidance: float = option(8.0, low=1.0, high=50.0)  # what sheets are drawn with, where it is embedded
    huber_c: float = option(1e-3, low=1e-9)  # of the pseudo-Huber loss; diffusers' script's
    # whose answer further down the path counts: the averaged student's (the paper) or its own (diffusers' LoRA script)
    target: str = option("student", choices=("student", "average"))
    beta1: float = option(0.9, low=0.0, high=0.999)
    lr: float = option(8e-6, low=0.0, high=1.0)


class Method(Distiller):
    sampler = "consistency"
    sheet_steps = (1, 2, 4)

    def __init__(self, options: Options, loop: LoopOptions) -> None:
        if options.guidance_low > options.guidance_high:
            raise RecipeError("guidance_low must not be above guidance_high.")
        if options.lora_rank and options.embed_guidance:
            raise RecipeError("a LoRA cannot add the guidance embedding to its teacher: set embed_guidance = false.")
        if options.lora_rank and options.guidance_low != options.guidance_high:
            raise RecipeError(
                "a LoRA is not conditioned on the guidance scale: set guidance_low and guidance_high to one value."
            )
        super().__init__(options, loop)
        mine, its = self.student_denoiser.schedule, self.teacher_denoiser.schedule
        if len(mine.alpha) != len(its.alpha) or not np.allclose(mine.alpha, its.alpha, rtol=0, atol=1e-6):
            raise RecipeError("lcm follows the teacher's path: the student's noise schedule must be the teacher's.")
        if options.embed_guidance:
            self.guidance_note = f"the guidance scale that you like (`guidance_scale={options.sheet_guidance:g}`)"
        self.sampler_config = {"original_inference_steps": options.ddim_steps}
        self.optimizers["student"] = adamw(self.student, options.lr, options.beta1)

    def new_student(self, unet: Any) -> Any:
        """The teacher's copy, with a layer for the guidance scale that starts at no effect."""
        if not self.options.embed_guidance:
            return super().new_student(unet)
        # Without the config's notes on itself: of an older UNet they would put diffusers' default, none, in its place.
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        student = type(unet).from_config({**config, "time_cond_proj_dim": EMBEDDING})
        missing, unexpected = student.load_state_dict(unet.state_dict(), strict=False)
        assert not unexpected
        assert set(missing) <= {"time_embedding.cond_proj.weight"}
        if missing:
            torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
        return student

    def step(self, state: TrainState, batch: Batch) -> Objectives:
        options, draw = self.options, state.draw
        x0, conditioning = self.read(batch)  # [B, C, h, w]
        count, device = len(x0), x0.device

        # --- a place on the teacher's path, and the guidance to follow it with ---
        skip = self.student_denoiser.schedule.num_train_timesteps // options.ddim_steps  # k
        later = draw.integers(1, options.ddim_steps, count).to(device) * skip - 1  # t_{n+k}, [B]
        earlier = (later - skip).clamp(min=0)  # t_n
        span = options.guidance_high - options.guidance_low
        w = options.guidance_low + span * draw.uniform(count).to(device)  # [B]
        x_later = add_noise(x0, draw.normal(*x0.shape).to(device), *self.student_denoiser.signal(later))

        # --- one DDIM step of the guided teacher down to t_n, LCM Eq. 14 ---
        with torch.no_grad():
            alpha, sigma = self.teacher_denoiser.signal(later)
            estimate = self.teacher_denoiser.guided_x0(x_later, later, conditioning, self.empty, w.view(-1, 1, 1, 1))
            noise = (x_later - alpha * estimate) / sigma
            x_earlier = add_noise(estimate, noise, *self.teacher_denoiser.signal(earlier))

        # --- both ends must agree on x0, LCM Eq. 17 ---
        embedded = w if options.embed_guidance else None
        asked = state.using_average("student") if options.target == "average" else nullcontext()
        with torch.no_grad(), asked:
            there = self.consistent(x_earlier, earlier, conditioning, embedded)
        here = self.consistent(x_later, later, conditioning, embedded)
        loss = pseudo_huber(here, there, options.huber_c)
        yield "student", loss, {"loss": loss, "distance": (here - there).square().mean().sqrt()}

    def consistent(self, x: Tensor, t: Tensor, conditioning: Any, guidance_scale: Tensor | None) -> Tensor:
        """f(x, t) = c_skip x + c_out x0(x, t), LCM Eq. 9: x itself at t = 0."""
        c_skip, c_out = (part.view(-1, 1, 1, 1) for part in boundary_scalings(t))
        return c_skip * x + c_out * self.student_denoiser.x0(x, t, conditioning, guidance_scale)

    def sheet_x0(self, steps: int) -> Tensor:
        shape = (self.space.channels, self.side, self.side)
        w = torch.full((len(self.sheet_text.text),), self.options.sheet_guidance, device=self.empty.text.device)
        return self.student_denoiser.sample(
            self.sheet_text,
            self.empty,
            shape,
            steps,
            sampler=self.sampler,
            guidance_scale=w if self.options.embed_guidance else None,
        )
