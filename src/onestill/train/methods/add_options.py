"""ADD's options: a table for each part of the method, each with where its default comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from onestill.errors import RecipeError
from onestill.train.discriminator.heads import HeadOptions
from onestill.train.discriminator.inputs import NOISED, FeatureOptions, InputOptions
from onestill.train.methods.distiller import DistilOptions
from onestill.train.recipe import option


@dataclass(frozen=True, kw_only=True)
class StudentInputOptions:
    """What the student is given: a real image noised to one of a few timesteps (section 3.1)."""

    # the trailing ones that a sampler visits in four steps; N = 4 and pure noise are section 3.1's, the rest not stated
    timesteps: list[int] = option([999, 749, 499, 249], low=0, high=999, was="student_timesteps")
    weights: list[float] = option([1.0, 1.0, 1.0, 1.0], low=0.0, was="timestep_weights")  # relative; uniform in 3.1
    # at t = 999 noise of variance 1 alone, what zero terminal SNR (3.1) comes to; "schedule" leaves its rest of x0 in
    terminal_noise: str = option("pure", choices=("pure", "schedule"))


@dataclass(frozen=True, kw_only=True)
class AdversarialOptions:
    """The game of student and heads (Eqs. 2 and 3)."""

    weight: float = option(1.0, low=0.0, was="adversarial")  # of Eq. 2 in Eq. 1, where it is 1; see docs/distil.md
    gamma_r1: float = option(1e-5, low=0.0)  # section 4; 0 saves the time of its second derivative
    misaligned: float = option(0.0, low=0.0)  # weight of real images under a wrong caption, as fakes; AMD, SANA-Sprint
    student_every: int = option(1, low=1)  # iterations between two steps of the student; 2 to 5 in DMD2
    heads_first: int = option(0, low=0)  # iterations before the student's first step; measured on icons (LOG.md)


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """The teacher's part (Eq. 4)."""

    lambda_distill: float = option(2.5, low=0.0)  # lambda of section 3.3
    # c(t): exponential, alpha_t, is the paper's default; NFSD is what the released model used (App. A)
    weighting: str = option("exponential", choices=("exponential", "sds", "nfsd"))
    score_weight: str = option("one", choices=("one", "sigma_squared"))  # w(t) of SDS and NFSD
    nfsd_guidance: float = option(7.5, low=0.0, high=100.0)  # s, a usual guidance scale
    negative_prompt: str = option(  # of NFSD, Katzir et al. 2310.17590
        "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark"
    )
    teacher_steps: int = option(1, low=1, high=50)  # DDIM steps down to x_psi; more are no better, Table 1f
    teacher_guidance: float = option(1.0, low=1.0, high=50.0)  # of x_psi; not stated, above 1 costs two passes
    t_low: int = option(20, low=0, high=999, was="teacher_low")  # t is uniform between these; not stated, DMD2's
    t_high: int = option(980, low=0, high=999, was="teacher_high")
    # the paper decodes both even for latent models, which costs a decoder with gradient; not for NFSD
    space: str = option("latents", choices=("latents", "pixels"), was="distillation_space")

    @property
    def in_pixels(self) -> bool:
        """Whether both are decoded. NFSD's x_psi is no image that a decoder knows: its gradient would be lost."""
        return self.space == "pixels" and self.weighting != "nfsd"


@dataclass(frozen=True, kw_only=True)
class Options(DistilOptions):
    """What is distilled, and a table for each part of the method. "Not stated": the paper leaves it open."""

    student_input: StudentInputOptions = field(default_factory=StudentInputOptions)
    features: FeatureOptions = field(default_factory=FeatureOptions)
    discriminator_input: InputOptions = field(default_factory=InputOptions)
    heads: HeadOptions = field(default_factory=HeadOptions)
    adversarial: AdversarialOptions = field(default_factory=AdversarialOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)


def check(options: Options) -> None:
    """Raise RecipeError for options that contradict each other."""
    student_input, distillation, heads = options.student_input, options.distillation, options.heads
    if len(student_input.weights) != len(student_input.timesteps):
        raise RecipeError("student_input.weights needs one number for each of student_input.timesteps.")
    if not sum(student_input.weights) > 0:
        raise RecipeError("student_input.weights are all zero: give at least one timestep a weight.")
    if heads.width % 8:
        raise RecipeError("heads.width must be a multiple of 8: the heads normalise their channels in 8 groups.")
    if distillation.t_low > distillation.t_high:
        raise RecipeError("distillation.t_low must not be above its t_high.")
    if distillation.weighting == "nfsd" and (distillation.teacher_steps > 1 or distillation.teacher_guidance != 1.0):
        raise RecipeError("weighting nfsd takes one teacher step, guided by nfsd_guidance: leave the other two at 1.")
    if options.adversarial.misaligned and not heads.condition_on_text:
        raise RecipeError("misaligned captions need heads.condition_on_text = true: without it no head reads them.")
    if heads.condition_on_level and options.features.network not in NOISED:
        raise RecipeError("heads.condition_on_level needs the teacher's features, the only ones that see noise.")
    if options.shard_teacher and options.features.network in NOISED:
        raise RecipeError("shard_teacher needs features that are not the teacher's own, which are read block by block.")
