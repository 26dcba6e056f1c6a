"""Adversarial Diffusion Distillation (arXiv 2311.17042): a student that draws in one step.

The student starts as the teacher. From a real image noised to one of a few timesteps (Eq. 1) it makes x_theta in one
call; heads on frozen features tell it from real images (Eqs. 2, 3); the teacher, shown x_theta noised again, says what
it would have made of it (Eq. 4). `docs/distil.md` gives the reason for each choice that the paper leaves open.

Shapes: B batch, C latent channels, h w latent size, H W pixels, K tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onestill.errors import RecipeError
from onestill.networks.condition import Condition
from onestill.networks.text_encoder import open_text_encoder
from onestill.schedule import add_noise
from onestill.train.discriminator.heads import LEVEL_WIDTH, Discriminator, HeadCondition, level_embedding
from onestill.train.discriminator.inputs import NOISED, View, ViewOptions, Views
from onestill.train.losses import (
    distillation,
    exponential_weight,
    hinge_discriminator,
    hinge_fake,
    hinge_generator,
    nfsd_direction,
    r1,
    score_target,
    sds_weight,
)  # fmt: skip
from onestill.train.methods.distiller import Distiller, DistilOptions
from onestill.train.noise import Draw
from onestill.train.optim.step import Batch, Update, frozen
from onestill.train.recipe import LoopOptions, option
from onestill.train.runtime.compiling import compiled
from onestill.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Options(DistilOptions, ViewOptions):
    """The paper's names. `timestep_weights` are relative; `terminal_noise` says what the student sees at the last.

    `distillation_space` is "latents" or "pixels"; for pixels the latents are decoded, with gradient. `teacher_low` and
    `teacher_high` bound t of Eq. 4. `nfsd_guidance` and `negative_prompt` are noise-free score distillation's, and
    `score_weight` is w(t) of it and of SDS. `misaligned` weighs real images with another's caption as more fakes.
    `student_every` gives the student a turn each so many iterations, after `heads_first` in which it stands still.
    """

    condition_on_text: bool = option(True)
    condition_on_image: bool = option(True)
    condition_on_level: bool = option(False)
    head_text_encoder: str = option("")
    drop_image_at_terminal: bool = option(True)
    student_timesteps: list[int] = option([999, 749, 499, 249], low=0, high=999)
    timestep_weights: list[float] = option([1.0, 1.0, 1.0, 1.0], low=0.0)
    terminal_noise: str = option("pure", choices=("pure", "schedule"))
    adversarial: float = option(1.0, low=0.0)
    lambda_distill: float = option(2.5, low=0.0)
    gamma_r1: float = option(1e-5, low=0.0)
    misaligned: float = option(0.0, low=0.0)
    weighting: str = option("exponential", choices=("exponential", "sds", "nfsd"))
    score_weight: str = option("one", choices=("one", "sigma_squared"))
    nfsd_guidance: float = option(7.5, low=0.0, high=100.0)
    negative_prompt: str = option("unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark")
    teacher_steps: int = option(1, low=1, high=50)
    teacher_guidance: float = option(1.0, low=1.0, high=50.0)
    teacher_low: int = option(20, low=0, high=999)
    teacher_high: int = option(980, low=0, high=999)
    distillation_space: str = option("latents", choices=("latents", "pixels"))
    head_width: int = option(128, low=8)
    head_blocks: int = option(1, low=1, high=8)
    student_every: int = option(1, low=1)
    heads_first: int = option(0, low=0)
    discriminator_lr: float = option(2e-4, low=0.0, high=1.0)
    beta1: float = option(0.0, low=0.0, high=0.999)


class Method(Distiller):
    def __init__(self, options: Options, loop: LoopOptions) -> None:
        check(options)
        super().__init__(options, loop)
        if options.weighting != "exponential" and self.teacher_denoiser.schedule.alpha[options.teacher_high] == 0:
            raise RecipeError("sds and nfsd divide by alpha, which is 0 at the last timestep: lower teacher_high.")
        self.views = Views(options, self.teacher_denoiser, self.space, self.draw_levels)
        head_encoder = options.head_text_encoder
        self.words = open_text_encoder(head_encoder, parts=("",)) if head_encoder else None
        self.negative = self.told([options.negative_prompt])
        text_width = self.words.width if self.words else self.empty.embedding.shape[-1]
        self.discriminator = Discriminator(
            self.views.widths,
            options.head_width,
            text_width if options.condition_on_text else 0,
            self.views.image_encoder.embedding_width if options.condition_on_image else 0,
            LEVEL_WIDTH if options.condition_on_level else 0,
            options.head_blocks,
        )
        self.networks["discriminator"] = self.heads = self.discriminator
        self.optimizers["student"] = self.adam(self.student, options.lr, options.beta1)
        self.optimizers["discriminator"] = self.adam(self.discriminator, options.discriminator_lr, options.beta1)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.discriminator.to(device)
        self.views.to(device, self.frozen_dtype)
        self.negative = self.negative.to(device)
        if self.words:
            self.words.to(device)
        self.views.compile(self.loop, device)
        # R1 differentiates a gradient, which no compiled network can.
        self.heads = self.discriminator if self.options.gamma_r1 else compiled(self.discriminator, self.loop, device)

    def step(self, state: TrainState, batch: Batch, update: Update) -> dict[str, Tensor]:
        options, draw, heads = self.options, state.draw, self.heads
        x0, told = self.read(batch)  # [B, C, h, w]
        plays = state.iteration >= options.heads_first and state.iteration % options.student_every == 0

        # --- generate once: x_theta from a real image noised to a student timestep, Eq. 1 ---
        s = self.student_timesteps(len(x0), state).to(x0.device)  # [B]
        with torch.set_grad_enabled(plays):
            x_theta = self.student_denoiser.x0(self.noised(x0, s, draw), s, told)  # [B, C, h, w]

        # --- what the heads see of both, under one view; one forward serves both turns ---
        view = self.views.draw(x0, draw)
        with torch.no_grad():
            real = [tap.requires_grad_() for tap in view(x0, told)]  # F_k(x0), [B, N_k, D_k] each
            c = self.head_condition(x0, s, view, told, batch)  # c_text, c_img
        with torch.set_grad_enabled(plays):
            fake = view(x_theta, told)  # F_k(x_theta)

        # --- the discriminator's turn: hinge over heads, R1 on the heads' inputs, Eq. 3 ---
        real_logits, fake_logits = heads(real, c), heads([tap.detach() for tap in fake], c)
        hinge = hinge_discriminator(real_logits, fake_logits)
        penalty = r1(real, real_logits) if options.gamma_r1 else torch.zeros_like(hinge)
        wrong = self.misaligned(real, c, batch) if options.misaligned else torch.zeros_like(hinge)
        update("discriminator", hinge + options.gamma_r1 * penalty + options.misaligned * wrong)

        # --- the student's turn: Eq. 2 and lambda times Eq. 4 ---
        losses = {"hinge": hinge, "r1": penalty}
        if plays:
            with frozen(self.discriminator):
                adversarial = hinge_generator(heads(fake, c))
                distill = self.distill(x_theta, told, view, draw) if options.lambda_distill else torch.zeros_like(hinge)
                update("student", options.adversarial * adversarial + options.lambda_distill * distill)
            losses |= {"adversarial": adversarial, "distill": distill}
        return losses | ({"misaligned": wrong} if options.misaligned else {}) | means(real_logits, fake_logits)

    def distill(self, x_theta: Tensor, told: Condition, view: View, draw: Draw) -> Tensor:
        """Eq. 4: the teacher's x0 from x_theta noised to t, weighted by c(t); no gradient through the teacher."""
        options, count = self.options, len(x_theta)
        t = draw.integers(options.teacher_low, options.teacher_high, count).to(x_theta.device)  # [B]
        eps = draw.normal(*x_theta.shape).to(x_theta.device)
        alpha, sigma = self.teacher_denoiser.signal(t)
        with torch.no_grad():
            x_psi = self.target(x_theta.detach(), eps, t, told)
        if options.weighting == "exponential":
            weight = exponential_weight(alpha)
        else:
            weight = sds_weight(alpha, sigma, sigma.square() if options.score_weight == "sigma_squared" else 1.0)
        if options.distillation_space == "pixels":
            x_theta, x_psi = view.pixels(x_theta), view.pixels(x_psi)
        return distillation(x_theta, x_psi, weight.flatten())

    def target(self, x_theta: Tensor, eps: Tensor, t: Tensor, told: Condition) -> Tensor:
        """x_psi [B, C, h, w]: the teacher's x0 of x_theta noised to t, or what has NFSD's gradient."""
        teacher, options = self.teacher_denoiser, self.options
        alpha, sigma = teacher.signal(t)
        x_t = add_noise(x_theta, eps, alpha, sigma)
        if options.weighting == "nfsd":
            others = (told, self.empty.expand(len(t)).sized(told), self.negative.expand(len(t)).sized(told))
            text, empty, negative = (teacher.eps(x_t, t, one) for one in others)
            direction = nfsd_direction(text, empty, negative, t, options.nfsd_guidance)
            return score_target(x_theta, direction, alpha, sigma)
        for left in range(options.teacher_steps - 1, 0, -1):  # DDIM, from t in equal steps down
            x_psi = teacher.guided_x0(x_t, t, told, self.empty, options.teacher_guidance)
            noise = (x_t - alpha * x_psi) / sigma
            t = t * left // (left + 1)
            alpha, sigma = teacher.signal(t)
            x_t = add_noise(x_psi, noise, alpha, sigma)
        return teacher.guided_x0(x_t, t, told, self.empty, options.teacher_guidance)

    def noised(self, x0: Tensor, s: Tensor, draw: Draw) -> Tensor:
        """x_s of Eq. 1; at the last timestep pure noise of unit variance, which is what a sampler starts from."""
        eps = draw.normal(*x0.shape).to(x0.device)
        x_s: Tensor = add_noise(x0, eps, *self.student_denoiser.signal(s))
        if self.options.terminal_noise == "schedule":
            return x_s
        return torch.where((s == self.student_denoiser.last).view(-1, 1, 1, 1), eps, x_s)

    def timestep_weights(self, state: TrainState) -> list[float]:
        """How often each student timestep is drawn now, relative."""
        return list(self.options.timestep_weights)

    def student_timesteps(self, count: int, state: TrainState) -> Tensor:
        """s, [B] from the student's timesteps."""
        return state.draw.among(self.options.student_timesteps, self.timestep_weights(state), count)

    def draw_levels(self, count: int, draw: Draw) -> Tensor:
        """Noise levels under the teacher's features, [B]."""
        return draw.integers(self.options.feature_low, self.options.feature_high, count)

    def head_condition(self, x0: Tensor, s: Tensor, view: View, told: Condition, batch: Batch) -> HeadCondition:
        """c_text; c_img, zero where the student was given nothing of the image; the noise under the features."""
        options, text, image = self.options, None, None
        if options.condition_on_text:
            text = self.words.embed(batch["captions"]) if self.words else told.embedding
        if options.condition_on_image:
            image = self.views.embed(x0)
            if options.drop_image_at_terminal:
                image = image.masked_fill((s == self.student_denoiser.last).unsqueeze(1), 0.0)
        return HeadCondition(text, image, level_embedding(view.at) if options.condition_on_level else None)

    @torch.no_grad()
    def from_data(self) -> tuple[list[Tensor], list[str]]:
        """x_theta of a few samples of the last batch, at each student timestep; the noise is always the same."""
        if self.shown is None:
            return [], []
        x0, told = self.shown
        made, captions = list[Tensor](), list[str]()
        for timestep in self.options.student_timesteps:
            s = torch.full((len(x0),), timestep, device=x0.device)
            draw = Draw(torch.Generator("cpu").manual_seed(0))  # the same noise on every device
            made.append(self.student_denoiser.eager.x0(self.noised(x0, s, draw), s, told))
            captions += [f"from {timestep}"] * len(x0)
        return made, captions

    def misaligned(self, real: Sequence[Tensor], c: HeadCondition, batch: Batch) -> Tensor:
        """The fakes' half of Eq. 3 for real images under the caption of the sample before."""
        assert c.text is not None
        captions = batch["captions"]
        differ = [mine != other for mine, other in zip(captions, [*captions[-1:], *captions[:-1]], strict=True)]
        logits = self.heads([tap.detach() for tap in real], HeadCondition(c.text.roll(1, 0), c.image, c.level))
        return hinge_fake(logits, torch.tensor(differ).to(c.text.device, non_blocking=True))


def means(real: Sequence[Tensor], fake: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean logits, over all heads and for each."""
    found = {}
    for name, logits in (("real_logits", real), ("fake_logits", fake)):
        found[name] = torch.cat([one.detach().flatten() for one in logits]).mean()
        found |= {f"{name}/{k}": one.detach().mean() for k, one in enumerate(logits)}
    return found


def check(options: Options) -> None:
    """Raise RecipeError for options that contradict each other."""
    if len(options.timestep_weights) != len(options.student_timesteps):
        raise RecipeError("timestep_weights needs one number for each of student_timesteps.")
    if not sum(options.timestep_weights) > 0:
        raise RecipeError("timestep_weights are all zero: give at least one timestep a weight.")
    if options.head_width % 8:
        raise RecipeError("head_width must be a multiple of 8: the heads normalise their channels in 8 groups.")
    if options.teacher_low > options.teacher_high:
        raise RecipeError("teacher_low must not be above teacher_high.")
    if options.weighting == "nfsd" and (options.teacher_steps > 1 or options.teacher_guidance != 1.0):
        raise RecipeError("weighting nfsd takes one teacher step, guided by nfsd_guidance: leave the other two at 1.")
    if options.misaligned and not options.condition_on_text:
        raise RecipeError("misaligned captions need condition_on_text = true: without it no head reads them.")
    if options.condition_on_level and options.feature_network not in NOISED:
        raise RecipeError("condition_on_level needs the teacher's features, the only ones that see noise.")
