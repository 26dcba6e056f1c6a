"""Adversarial Diffusion Distillation (arXiv 2311.17042): a student that draws in one step.

The student starts as the teacher. From a real image noised to one of a few timesteps it makes x_theta in one call
(section 3.1); heads on frozen features tell it from real images (Eqs. 2, 3); the teacher, shown x_theta noised again,
says what it would have made of it (Eq. 4). Eq. 1 adds the two up. `docs/distil.md` gives the reason for each choice
that the paper leaves open.

Shapes: B batch, C latent channels, h w latent size, H W pixels, K tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onestill.errors import RecipeError
from onestill.networks.condition import Condition
from onestill.networks.text_encoder import open_text_encoder
from onestill.schedule import add_noise
from onestill.train.batches import batch_condition, captions_before
from onestill.train.discriminator.heads import (
    LEVEL_WIDTH,
    Discriminator,
    HeadCondition,
    level_embedding,
    mean_logits,
)
from onestill.train.discriminator.inputs import (
    DiscriminatorInputs,
    InputTransform,
)
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
from onestill.train.methods.add_options import Options, check
from onestill.train.methods.distiller import Distiller
from onestill.train.noise import Draw, Part
from onestill.train.optim.adam import adamw
from onestill.train.optim.step import Batch, Objectives, frozen
from onestill.train.recipe import LoopOptions
from onestill.train.runtime.compiling import compiled
from onestill.train.state import TrainState


class Method(Distiller):
    def __init__(self, options: Options, loop: LoopOptions) -> None:
        check(options)
        super().__init__(options, loop)
        heads, t_high = options.heads, options.distillation.t_high
        if options.distillation.weighting != "exponential" and self.teacher_denoiser.schedule.alpha[t_high] == 0:
            raise RecipeError("sds and nfsd divide by alpha, which is 0 at the end: lower distillation.t_high.")
        self.inputs = DiscriminatorInputs(
            options.features, options.discriminator_input, self.teacher_denoiser, self.space, self.draw_levels
        )
        self.head_text_encoder = open_text_encoder(heads.text_encoder, parts=("",)) if heads.text_encoder else None
        self.negative = self.conditioning([options.distillation.negative_prompt])
        text_width = self.head_text_encoder.width if self.head_text_encoder else self.empty.embedding.shape[-1]
        self.discriminator = Discriminator(
            self.inputs.widths,
            heads.width,
            text_width if heads.condition_on_text else 0,
            self.inputs.image_encoder.embedding_width if heads.condition_on_image else 0,
            LEVEL_WIDTH if heads.condition_on_level else 0,
            heads.blocks,
        )
        self.networks["discriminator"] = self.heads = self.discriminator
        # Momentum chases a moving opponent: none for either, as in StyleGAN-T.
        self.optimizers["student"] = adamw(self.student, options.lr, beta1=0.0)
        self.optimizers["discriminator"] = adamw(self.discriminator, heads.lr, beta1=0.0)
        self.optimizers["student"].begins = options.adversarial.heads_first  # type: ignore[attr-defined]

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.discriminator.to(device)
        self.inputs.to(device, self.frozen_dtype)
        self.negative = self.negative.to(device)
        if self.head_text_encoder:
            self.head_text_encoder.to(device)
        self.inputs.compile(self.loop, device)
        # R1 differentiates a gradient, which no compiled network can.
        has_r1 = self.options.adversarial.gamma_r1 > 0
        self.heads = self.discriminator if has_r1 else compiled(self.discriminator, self.loop, device)

    def step(self, state: TrainState, batch: Batch) -> Objectives:
        adversarial, lambda_distill = self.options.adversarial, self.options.distillation.lambda_distill
        draw, zero = state.draw, torch.zeros(())
        x0, conditioning = self.read(batch)  # [B, C, h, w]
        trains_student = state.iteration >= adversarial.heads_first and state.iteration % adversarial.student_every == 0

        # --- generate once: x_theta from a real image noised to a student timestep ---
        s = self.student_timesteps(len(x0), state).to(x0.device)  # [B]
        with torch.set_grad_enabled(trains_student):
            x_s = self.noised(x0, s, draw)  # alpha_s x0 + sigma_s eps, section 3.1
            x_theta = self.student_denoiser.x0(x_s, s, conditioning)  # [B, C, h, w]

        # --- features of both under one random transform; one forward serves both losses ---
        transform = self.inputs.draw(x0, draw)
        with torch.no_grad():
            real = [one.requires_grad_() for one in transform.features(x0, conditioning)]  # F_k(x0), [B, N_k, D_k]
            c = self.head_condition(x0, s, transform, conditioning, batch)  # c_text and c_img of section 3.2
        with torch.set_grad_enabled(trains_student):
            fake = transform.features(x_theta, conditioning)  # F_k(x_theta)

        # --- update the discriminator ---
        real_logits, fake_logits = self.heads(real, c), self.heads([one.detach() for one in fake], c)
        hinge = hinge_discriminator(real_logits, fake_logits)  # Eq. 3
        penalty = r1(real, real_logits) if adversarial.gamma_r1 else zero  # Eq. 3's R1, on the heads' inputs
        wrong = self.misaligned(real, c, batch, state.part) if adversarial.misaligned else zero
        loss = hinge + adversarial.gamma_r1 * penalty + adversarial.misaligned * wrong
        shown = {"hinge": hinge, "r1": penalty, **({"misaligned": wrong} if adversarial.misaligned else {})}
        yield "discriminator", loss, shown | mean_logits(real_logits, fake_logits)

        # --- update the student, against the heads as they are now ---
        if trains_student:
            with frozen(self.discriminator):
                fooled = hinge_generator(self.heads(fake, c))  # Eq. 2
                distill = self.distill(x_theta, conditioning, transform, draw) if lambda_distill else zero  # Eq. 4
                loss = adversarial.weight * fooled + lambda_distill * distill  # Eq. 1
                yield "student", loss, {"adversarial": fooled, "distill": distill}

        # --- averages: the loop moves the student's running mean, `TrainState.update_ema` ---

    def distill(self, x_theta: Tensor, conditioning: Condition, transform: InputTransform, draw: Draw) -> Tensor:
        """Eq. 4: the teacher's x0 from x_theta noised to t, weighted by c(t); no gradient through the teacher."""
        options = self.options.distillation
        t = draw.integers(options.t_low, options.t_high, len(x_theta)).to(x_theta.device)  # [B]
        eps = draw.normal(*x_theta.shape).to(x_theta.device)
        alpha, sigma = self.teacher_denoiser.signal(t)
        with torch.no_grad():
            x_psi = self.target(x_theta.detach(), eps, t, conditioning)
        if options.weighting == "exponential":
            weight = exponential_weight(alpha)
        else:
            weight = sds_weight(alpha, sigma, sigma.square() if options.score_weight == "sigma_squared" else 1.0)
        if options.in_pixels:
            x_theta, x_psi = transform.pixels(x_theta), transform.pixels(x_psi)
        return distillation(x_theta, x_psi, weight.flatten())

    def target(self, x_theta: Tensor, eps: Tensor, t: Tensor, conditioning: Condition) -> Tensor:
        """x_psi [B, C, h, w]: the teacher's x0 of x_theta noised to t, or what has NFSD's gradient."""
        teacher, options = self.teacher_denoiser, self.options.distillation
        alpha, sigma = teacher.signal(t)
        x_t = add_noise(x_theta, eps, alpha, sigma)
        if options.weighting == "nfsd":
            texts = (self.empty.expand(len(t)).sized(conditioning), self.negative.expand(len(t)).sized(conditioning))
            text, empty, negative = (teacher.eps(x_t, t, one) for one in (conditioning, *texts))
            direction = nfsd_direction(text, empty, negative, t, options.nfsd_guidance)
            return score_target(x_theta, direction, alpha, sigma)
        for left in range(options.teacher_steps - 1, 0, -1):  # DDIM, from t in equal steps down
            x_psi = teacher.guided_x0(x_t, t, conditioning, self.empty, options.teacher_guidance)
            noise = (x_t - alpha * x_psi) / sigma
            t = t * left // (left + 1)
            alpha, sigma = teacher.signal(t)
            x_t = add_noise(x_psi, noise, alpha, sigma)
        return teacher.guided_x0(x_t, t, conditioning, self.empty, options.teacher_guidance)

    def noised(self, x0: Tensor, s: Tensor, draw: Draw) -> Tensor:
        """x_s of section 3.1; at the last timestep pure noise of unit variance, which is what a sampler starts from."""
        eps = draw.normal(*x0.shape).to(x0.device)
        x_s: Tensor = add_noise(x0, eps, *self.student_denoiser.signal(s))
        if self.options.student_input.terminal_noise == "schedule":
            return x_s
        return torch.where((s == self.student_denoiser.last).view(-1, 1, 1, 1), eps, x_s)

    def timestep_weights(self, state: TrainState) -> list[float]:
        """How often each student timestep is drawn now, relative."""
        return list(self.options.student_input.weights)

    def student_timesteps(self, count: int, state: TrainState) -> Tensor:
        """s, [B] from the student's timesteps."""
        return state.draw.among(self.options.student_input.timesteps, self.timestep_weights(state), count)

    def draw_levels(self, count: int, draw: Draw) -> Tensor:
        """Noise levels under the teacher's features, [B]."""
        options = self.options.discriminator_input
        return draw.integers(options.t_low, options.t_high, count)

    def head_condition(
        self, x0: Tensor, s: Tensor, transform: InputTransform, conditioning: Condition, batch: Batch
    ) -> HeadCondition:
        """c_text; c_img, zero where the student was given nothing of the image; the noise under the features."""
        options, text, image = self.options.heads, None, None
        if options.condition_on_text:
            text = self.head_text(batch["captions"], conditioning)
        if options.condition_on_image:
            image = self.inputs.embed(x0)
            if options.drop_image_at_terminal:
                image = image.masked_fill((s == self.student_denoiser.last).unsqueeze(1), 0.0)
        return HeadCondition(text, image, level_embedding(transform.timesteps) if options.condition_on_level else None)

    def head_text(self, captions: Sequence[str], conditioning: Condition) -> Tensor:
        """c_text, [B, E]."""
        return self.head_text_encoder.embed(captions) if self.head_text_encoder else conditioning.embedding

    @torch.no_grad()
    def from_data(self) -> tuple[list[Tensor], list[str]]:
        """x_theta of a few samples of the last batch, at each student timestep; the noise is always the same."""
        if self.shown is None:
            return [], []
        x0, conditioning = self.shown
        made, captions = list[Tensor](), list[str]()
        for timestep in self.options.student_input.timesteps:
            s = torch.full((len(x0),), timestep, device=x0.device)
            draw = Draw(torch.Generator("cpu").manual_seed(0))  # the same noise on every device
            made.append(self.student_denoiser.eager.x0(self.noised(x0, s, draw), s, conditioning))
            captions += [f"from {timestep}"] * len(x0)
        return made, captions

    def misaligned(self, real: Sequence[Tensor], c: HeadCondition, batch: Batch, part: Part | None = None) -> Tensor:
        """The fakes' half of Eq. 3 for real images under the caption of the sample before, in the whole batch."""
        text = c.text
        assert text is not None

        def embed(row: Batch) -> Tensor:
            return self.head_text(row["captions"], batch_condition(row, text.device, self.native_px)).to(text)

        before, differ, count = captions_before(batch, text, part or Part(), embed)
        logits = self.heads([one.detach() for one in real], HeadCondition(before, c.image, c.level))
        return hinge_fake(logits, differ, count)
