"""Samplers: from noise to clean latents in one or a few calls of a network.

Every sampler asks the network for its estimate of the clean latents, x0, then steps to the next lower noise level:

    x' = alpha' x0 + sqrt(sigma'^2 - noise_std^2) eps + noise_std * noise        eps = (x - alpha x0) / sigma

Part of the noise that x' needs is the old noise eps, the rest is drawn anew, and whatever the share, x' is as noisy as
its timestep says. The familiar names differ only in `noise_std`, the
standard deviation of the new noise:

    noise_std = 0                       Euler, which in these coordinates is DDIM
    noise_std = the posterior's         Euler ancestral, which is DDIM with eta = 1, which is DDPM
    noise_std = sigma', all of it       consistency models (LCM)

DPM-Solver++ 2M also looks back at the previous x0, for teachers at many steps. The last call's x0 is the result, so one
step is one call: `sample_one_step`.

All are pure functions: what they need is an argument, no argument is changed. They use nothing but operators, so
latents may be NumPy arrays or torch tensors of any float dtype. Coordinates are those of `schedule`, in which pure
noise has unit variance and zero terminal SNR is no special case.

Shapes: x, x0, noise [B, C, h, w]; B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from onestill.errors import ScheduleError, StepsError, near
from onestill.schedule import Array, NoiseSchedule, add_noise

__all__ = [
    "DRAWING",
    "SAMPLERS",
    "Draw",
    "PredictX0",
    "Sampler",
    "blend",
    "classifier_free_guidance",
    "inpainting",
    "sample",
    "sample_consistency",
    "sample_ddim",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_one_step",
    "strength_timesteps",
]

PredictX0: TypeAlias = Callable[[Array, int], Array]  # (x [B, C, h, w], timestep) -> x0 [B, C, h, w]
Draw: TypeAlias = Callable[[int], Array]  # step -> new N(0, 1) noise like x, from one generator per image
Sampler: TypeAlias = Callable[[PredictX0, Array, NoiseSchedule, Sequence[int], Draw | None], Array]


class Level(NamedTuple):
    """A noise level: x = alpha x0 + sigma eps."""

    timestep: int
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """Half the log of the signal-to-noise ratio, lambda in DPM-Solver; -inf for pure noise."""
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


# --- samplers ------------------------------------------------------------------------------------------------------
#
# Arguments, the same for all:
#     predict_x0  the network: (x, timestep) -> x0; `NoiseSchedule.x0` turns an eps or v output into x0
#     x           where to start, at the noise level of timesteps[0]: `add_noise(x0, noise, *schedule.at(timesteps[0]))`
#                 with the latents of an image, or with x0 = 0 to start from noise alone
#     timesteps   falling, each one call of the network: `NoiseSchedule.timesteps(n)`, or `strength_timesteps`
#     draw        new noise for step 0, 1, ...; called in order, and only by samplers that add noise


def sample_one_step(predict_x0: PredictX0, x: Array, timestep: int = 999) -> Array:
    """One call, one picture: what a distilled student is for. Returns x0."""
    return predict_x0(x, timestep)


def sample_euler(
    predict_x0: PredictX0, x: Array, schedule: NoiseSchedule, timesteps: Sequence[int], draw: Draw | None = None
) -> Array:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn). Adds no noise."""
    return _sampling_loop(predict_x0, x, schedule, timesteps, draw, noise_std=lambda now, then: 0.0)


def sample_euler_ancestral(
    predict_x0: PredictX0, x: Array, schedule: NoiseSchedule, timesteps: Sequence[int], draw: Draw | None = None
) -> Array:
    """Euler steps that go lower and come back up with new noise; SDXL Turbo's sampler. Needs `draw`."""
    return _sampling_loop(predict_x0, x, schedule, timesteps, draw, noise_std=_posterior_std)


def sample_ddim(
    predict_x0: PredictX0,
    x: Array,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    draw: Draw | None = None,
    *,
    eta: float = 0.0,
) -> Array:
    """DDIM (Song et al. 2021, eq. 12). `eta` goes from 0, no new noise, to 1, DDPM; above 0 it needs `draw`.

    Raises:
        StepsError: for eta outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise StepsError(f"eta is {eta}; choose a number from 0 to 1.")
    return _sampling_loop(
        predict_x0, x, schedule, timesteps, draw, noise_std=lambda now, then: eta * _posterior_std(now, then)
    )


def sample_consistency(
    predict_x0: PredictX0, x: Array, schedule: NoiseSchedule, timesteps: Sequence[int], draw: Draw | None = None
) -> Array:
    """Noise each x0 from scratch (Song et al. 2023, algorithm 1); for consistency models and students. Needs `draw`."""
    return _sampling_loop(predict_x0, x, schedule, timesteps, draw, noise_std=lambda now, then: then.sigma)


def sample_dpmpp_2m(
    predict_x0: PredictX0, x: Array, schedule: NoiseSchedule, timesteps: Sequence[int], draw: Draw | None = None
) -> Array:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): teachers in 10 to 25 steps. Adds no noise."""
    levels = _levels(schedule, timesteps)
    earlier: tuple[Array, Level] | None = None
    for now, then in pairwise(levels):
        x0 = estimate = predict_x0(x, now.timestep)
        if earlier is not None:
            # Extrapolate along log_snr. After pure noise, infinitely far away, the slope is 0 and the step first-order.
            x0_before, before = earlier
            slope = (then.log_snr - now.log_snr) / (now.log_snr - before.log_snr)
            estimate = x0 + 0.5 * slope * (x0 - x0_before)
        scale = then.sigma / now.sigma
        x = scale * x + (then.alpha - scale * now.alpha) * estimate
        earlier = x0, now
    return predict_x0(x, levels[-1].timestep)


SAMPLERS: Mapping[str, Sampler] = {
    "consistency": sample_consistency,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
}


DRAWING = ("consistency", "euler_ancestral")  # those that add new noise, once between two steps


def sample(
    name: str,
    predict_x0: PredictX0,
    x: Array,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    draw: Draw | None = None,
) -> Array:
    """Run the sampler of this name in `SAMPLERS`. Arguments as for each of them. Returns x0 [B, C, h, w].

    Raises:
        ScheduleError: for an unknown name, or a sampler that needs `draw` and has none.
        StepsError: for timesteps that are empty, do not fall, or lie outside the schedule.
    """
    if name not in SAMPLERS:
        names = ", ".join(SAMPLERS)
        raise ScheduleError(f"No sampler is called '{name}'; choose one of {names}.{near(name, SAMPLERS)}")
    return SAMPLERS[name](predict_x0, x, schedule, timesteps, draw)


# --- the sampling loop ---------------------------------------------------------------------------------------------


def _sampling_loop(
    predict_x0: PredictX0,
    x: Array,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    draw: Draw | None,
    noise_std: Callable[[Level, Level], float],
) -> Array:
    """Predict, step down, repeat. `noise_std(now, then)` is the standard deviation of the new noise in the next x."""
    levels = _levels(schedule, timesteps)
    for step, (now, then) in enumerate(pairwise(levels)):
        x0 = predict_x0(x, now.timestep)
        eps = (x - now.alpha * x0) / now.sigma
        new = noise_std(now, then)
        old = math.sqrt(max(then.sigma**2 - new**2, 0.0))
        x = then.alpha * x0 + old * eps
        if new > 0:
            if draw is None:
                raise ScheduleError(
                    "This sampler adds new noise at each step; pass draw, such as noise.noise_source(seeds, shape)."
                )
            x = x + new * draw(step)
    return predict_x0(x, levels[-1].timestep)


def _posterior_std(now: Level, then: Level) -> float:
    """Standard deviation of x' given x and x0 under the forward process (Ho et al. 2020, eq. 7; DDIM's eq. 16)."""
    return then.sigma / now.sigma * math.sqrt(1.0 - (now.alpha / then.alpha) ** 2)


def _levels(schedule: NoiseSchedule, timesteps: Sequence[int]) -> list[Level]:
    size = schedule.num_train_timesteps
    falling = [int(timestep) for timestep in timesteps]
    if not falling or falling[0] >= size or falling[-1] < 0 or any(a <= b for a, b in pairwise(falling)):
        raise StepsError(f"timesteps must fall, from at most {size - 1} to at least 0, got {falling}.")
    return [Level(timestep, *schedule.at(timestep)) for timestep in falling]


# --- guidance, image to image, inpainting ---------------------------------------------------------------------------


def classifier_free_guidance(cond: Array, uncond: Array, guidance_scale: float) -> Array:
    """Push the output for a prompt away from the output for none (Ho and Salimans 2022); 1 leaves `cond` as it is.

    Eps, v and x0 depend linearly on each other at one x, so it does not matter which of them is guided.
    """
    return uncond + guidance_scale * (cond - uncond)


def inpainting(predict_x0: PredictX0, schedule: NoiseSchedule, mask: Array, image: Array, noise: Array) -> PredictX0:
    """A network that draws inside a mask alone, by latent blending (Avrahami et al. 2023), for every sampler here.

    Outside the mask, each call sees the image at the noise level of its timestep, and x0 is the image. All samplers
    compute each latent from the same latent of x and x0, so inside the mask nothing else changes.

    Args:
        predict_x0: the network.
        schedule: its noise schedule.
        mask: [1, 1, h, w], 1 where it draws and 0 where the image stays.
        image: latents [1, C, h, w].
        noise: the noise that sampling starts from, [B, C, h, w].
    """

    def predict_inside(x: Array, timestep: int) -> Array:
        noised = add_noise(image, noise, *schedule.at(timestep))
        return blend(mask, predict_x0(blend(mask, x, noised), timestep), image)

    return predict_inside


def blend(mask: Array, inside: Array, outside: Array) -> Array:
    """`inside` where the mask is 1, `outside` where it is 0."""
    return mask * inside + (1 - mask) * outside


def strength_timesteps(timesteps: Sequence[int], strength: float, num_train_timesteps: int = 1000) -> list[int]:
    """The timesteps that change an image by `strength`: that share of them, the last ones.

    [999, 749, 499, 249] at 0.5 -> [499, 249]. Where the share is less than one step, one step at its end, so that
    one-step models also leave some of the image: [999] at 0.5 -> [499]. Elsewhere equal to diffusers' image to image.

    Args:
        timesteps: falling.
        strength: in (0, 1]; 1 keeps nothing of the image on a schedule with zero terminal SNR.
        num_train_timesteps: T of the schedule.

    Raises:
        StepsError: for strength outside (0, 1].
    """
    if not 0.0 < strength <= 1.0:
        raise StepsError(f"strength is {strength}; choose a number above 0 and at most 1.")
    count = int(round(len(timesteps) * strength, 6))  # 0.29 of 100 is 29, whatever floats say
    return list(timesteps[-count:]) if count else [max(round(strength * num_train_timesteps) - 1, 0)]
