"""How much signal and how much noise there is at each timestep, and what a network's output means there.

One convention everywhere, the variance-preserving one: at timestep t in 0..T-1

    x = alpha * x0 + sigma * eps        alpha^2 + sigma^2 = 1,  alpha^2 = alphas_cumprod[t]

Timestep 0 is nearly clean, T - 1 is nearly (zero terminal SNR: exactly) pure noise. Tables are NumPy float64; the
conversions use nothing but operators, so `x` may be a NumPy array or a torch tensor and `alpha`, `sigma` may be floats
or arrays that broadcast against it, such as [B, 1, 1, 1] for one timestep a sample.

Shapes: T training timesteps (1000), B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from onestill.errors import ScheduleError, StepsError

PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing: TypeAlias = Literal["trailing", "leading", "lcm"]

# A numpy.ndarray or a torch.Tensor. No protocol describes both to a type checker without more text than it saves.
Array: TypeAlias = Any

__all__ = [
    "Array",
    "NoiseSchedule",
    "PredictionType",
    "TimestepSpacing",
    "add_noise",
    "cosine_alphas_cumprod",
    "lcm_timesteps",
    "leading_timesteps",
    "linear_alphas_cumprod",
    "rescale_zero_terminal_snr",
    "scaled_linear_alphas_cumprod",
    "to_eps",
    "to_v",
    "to_x0",
    "trailing_timesteps",
]


# --- tables: alphas_cumprod [T], falling from almost 1 -------------------------------------------------------------


def scaled_linear_alphas_cumprod(
    beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000
) -> NDArray[np.float64]:
    """Stable Diffusion's schedule: sqrt(beta) rises linearly. Returns alphas_cumprod [T]."""
    return _cumprod(np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2)


def linear_alphas_cumprod(
    beta_start: float = 0.0001, beta_end: float = 0.02, num_train_timesteps: int = 1000
) -> NDArray[np.float64]:
    """DDPM's schedule (Ho et al. 2020): beta rises linearly. Returns alphas_cumprod [T]."""
    return _cumprod(np.linspace(beta_start, beta_end, num_train_timesteps))


def cosine_alphas_cumprod(num_train_timesteps: int = 1000, max_beta: float = 0.999) -> NDArray[np.float64]:
    """The squared-cosine schedule (Nichol and Dhariwal 2021, eq. 17), each beta at most `max_beta`. Returns [T]."""
    t = np.arange(num_train_timesteps + 1) / num_train_timesteps
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return _cumprod(np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta))


def _cumprod(betas: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.cumprod(1.0 - betas), dtype=np.float64)


def rescale_zero_terminal_snr(alphas_cumprod: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift and scale alpha so that it ends at exactly 0 and starts where it was (Lin et al. 2023, algorithm 1).

    Without it a network never sees pure noise in training, yet is handed pure noise when it draws.

    Args:
        alphas_cumprod: [T], falling. Not changed.

    Returns:
        alphas_cumprod [T], whose last entry is exactly 0.
    """
    alpha = np.sqrt(alphas_cumprod)
    rescaled = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return np.asarray(rescaled**2, dtype=np.float64)


# --- timesteps: where along the schedule to call the network -------------------------------------------------------


def trailing_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Evenly spaced from the last timestep down: 1 -> [999], 4 -> [999, 749, 499, 249].

    Starts at pure noise for every count, which zero terminal SNR and one-step models require.

    Raises:
        StepsError: unless 1 <= num_inference_steps <= num_train_timesteps.
    """
    _check_steps(num_inference_steps, num_train_timesteps)
    stride = num_train_timesteps / num_inference_steps
    # The very expression of diffusers, for the same rounding; at 61 steps, among others, its arange overshoots by one.
    return [int(t) - 1 for t in np.arange(num_train_timesteps, 0, -stride).round()[:num_inference_steps]]


def leading_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000, steps_offset: int = 0) -> list[int]:
    """Multiples of T // n counted from 0, plus `steps_offset`: 4 -> [750, 500, 250, 0]. The older habit.

    Never reaches the last timestep, so use it only for models that were tuned with it.

    Raises:
        StepsError: unless 1 <= num_inference_steps <= num_train_timesteps.
    """
    _check_steps(num_inference_steps, num_train_timesteps)
    stride = num_train_timesteps // num_inference_steps
    return [min(i * stride + steps_offset, num_train_timesteps - 1) for i in reversed(range(num_inference_steps))]


def lcm_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000, original_steps: int = 50) -> list[int]:
    """Some of the timesteps that a latent consistency model was trained at: 4 -> [999, 759, 499, 259].

    Those are `original_steps` multiples of T // original_steps, less one (Luo et al. 2023).

    Raises:
        StepsError: unless 1 <= num_inference_steps <= original_steps.
    """
    _check_steps(num_inference_steps, original_steps)
    trained = np.arange(original_steps, 0, -1) * (num_train_timesteps // original_steps) - 1
    return [int(trained[int(i)]) for i in np.linspace(0, original_steps, num_inference_steps, endpoint=False)]


def _check_steps(num_inference_steps: int, num_train_timesteps: int) -> None:
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise StepsError(
            f"num_inference_steps is {num_inference_steps}; choose a whole number from 1 to {num_train_timesteps}."
        )


# --- conversions: x = alpha x0 + sigma eps, v = alpha eps - sigma x0 (Salimans and Ho 2022) ------------------------


def add_noise(x0: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """Noise clean latents: x = alpha x0 + sigma eps. All [B, C, h, w], or broadcastable to it."""
    return alpha * x0 + sigma * eps


def to_x0(output: Array, x: Array, alpha: Array, sigma: Array, prediction_type: PredictionType) -> Array:
    """The clean latents that a network's `output` at `x` stands for.

    Args:
        output: [B, C, h, w], what the network returned.
        x: [B, C, h, w], what the network was given.
        alpha: a float, or an array broadcastable to x.
        sigma: likewise.
        prediction_type: whether `output` is eps, v or x0.

    Raises:
        ScheduleError: for "epsilon" where alpha is 0: pure noise tells nothing about x0.
    """
    match prediction_type:
        case "sample":
            return output
        case "epsilon":
            _check_alpha(alpha)
            return (x - sigma * output) / alpha
        case "v_prediction":
            return alpha * x - sigma * output
    raise _unknown_prediction(prediction_type)


def to_eps(output: Array, x: Array, alpha: Array, sigma: Array, prediction_type: PredictionType) -> Array:
    """The noise that a network's `output` at `x` stands for. Arguments as for `to_x0`; sigma must not be 0."""
    match prediction_type:
        case "sample":
            return (x - alpha * output) / sigma
        case "epsilon":
            return output
        case "v_prediction":
            return alpha * output + sigma * x
    raise _unknown_prediction(prediction_type)


def to_v(output: Array, x: Array, alpha: Array, sigma: Array, prediction_type: PredictionType) -> Array:
    """The velocity v = alpha eps - sigma x0 that a network's `output` at `x` stands for. Arguments as for `to_x0`.

    Raises:
        ScheduleError: for "epsilon" where alpha is 0.
    """
    match prediction_type:
        case "sample":
            return (alpha * x - output) / sigma
        case "epsilon":
            _check_alpha(alpha)
            return (output - sigma * x) / alpha
        case "v_prediction":
            return output
    raise _unknown_prediction(prediction_type)


def _check_alpha(alpha: Array) -> None:
    is_zero = alpha == 0
    if is_zero if isinstance(is_zero, bool) else bool(is_zero.any()):
        raise ScheduleError(
            "An epsilon prediction says nothing about x0 where alpha is 0 (zero terminal SNR); "
            'use a model with prediction_type "v_prediction" or "sample", or an earlier timestep.'
        )


def _unknown_prediction(prediction_type: object) -> ScheduleError:
    return ScheduleError(
        f"prediction_type is {prediction_type!r}; it must be one of {', '.join(get_args(PredictionType))}."
    )


# --- the schedule of one model -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """What a model was trained on: the table, what its output means, and where its timesteps lie.

    Attributes:
        alphas_cumprod: [T] float64 in [0, 1), falling. Copied and made read-only.
        prediction_type: "epsilon", "v_prediction" or "sample" (x0).
        timestep_spacing: how `timesteps` chooses them.
        steps_offset: added by "leading" spacing.

    Raises:
        ScheduleError: for a table that does not fall within [0, 1), an unknown prediction type or spacing, or
            "epsilon" with zero terminal SNR.
    """

    alphas_cumprod: NDArray[np.float64]
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "trailing"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        table = np.array(self.alphas_cumprod, dtype=np.float64)
        table.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", table)
        if table.ndim != 1 or not len(table) or not (table < 1).all() or not (table >= 0).all():
            raise ScheduleError("alphas_cumprod must be one-dimensional with every entry in [0, 1).")
        if (np.diff(table) >= 0).any():
            raise ScheduleError("alphas_cumprod must fall from each timestep to the next.")
        if self.prediction_type not in get_args(PredictionType):
            raise _unknown_prediction(self.prediction_type)
        if self.timestep_spacing not in get_args(TimestepSpacing):
            raise ScheduleError(
                f"timestep_spacing is {self.timestep_spacing!r}; it must be trailing or leading or lcm."
            )
        if self.prediction_type == "epsilon":
            _check_alpha(table)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def alpha(self) -> NDArray[np.float64]:
        """[T] in [0, 1), the share of x0 in x."""
        return np.sqrt(self.alphas_cumprod)

    @property
    def sigma(self) -> NDArray[np.float64]:
        """[T] in (0, 1], the share of eps in x."""
        return np.sqrt(1.0 - self.alphas_cumprod)

    @property
    def snr(self) -> NDArray[np.float64]:
        """[T] alpha^2 / sigma^2, 0 at the end of a schedule with zero terminal SNR."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    def at(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) at one timestep, as Python floats so that they never widen an array's dtype."""
        alpha_bar = float(self.alphas_cumprod[timestep])
        return math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)

    def timesteps(self, num_inference_steps: int) -> list[int]:
        """The falling timesteps at which this model draws in `num_inference_steps` steps.

        Raises:
            StepsError: unless 1 <= num_inference_steps <= T.
        """
        if self.timestep_spacing == "trailing":
            return trailing_timesteps(num_inference_steps, self.num_train_timesteps)
        if self.timestep_spacing == "lcm":
            return lcm_timesteps(num_inference_steps, self.num_train_timesteps)
        return leading_timesteps(num_inference_steps, self.num_train_timesteps, self.steps_offset)

    def x0(self, output: Array, x: Array, timestep: int) -> Array:
        """`to_x0` with this schedule's alpha, sigma and prediction type at one timestep for the whole batch."""
        return to_x0(output, x, *self.at(timestep), self.prediction_type)

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers `scheduler_config.json`; a missing beta has diffusers' default.

        Only what a model was trained on is read; `onestill.checkpoint.scheduler_config` reads how it is sampled. An
        LCMScheduler's spacing is "lcm"; any other but "leading" becomes trailing.

        Raises:
            ScheduleError: for a schedule that is none of the beta schedules, such as flow matching.
        """
        config = scheduler_config
        name = config.get("beta_schedule", "linear")
        size = int(config.get("num_train_timesteps", 1000))
        if "Flow" in str(config.get("_class_name", "")) or config.get("use_flow_sigmas"):
            raise ScheduleError("Flow-matching schedules are not supported; give a model with a beta schedule.")
        if config.get("trained_betas") is not None:
            table = _cumprod(np.asarray(config["trained_betas"], dtype=np.float64))
        elif name in ("linear", "scaled_linear"):
            make = linear_alphas_cumprod if name == "linear" else scaled_linear_alphas_cumprod
            table = make(float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02)), size)
        elif name == "squaredcos_cap_v2":
            table = cosine_alphas_cumprod(size)
        else:
            raise ScheduleError(
                f"beta_schedule is {name!r}; it must be one of linear, scaled_linear, squaredcos_cap_v2."
            )
        spacing: TimestepSpacing = "leading" if config.get("timestep_spacing") == "leading" else "trailing"
        if config.get("rescale_betas_zero_snr"):
            table = rescale_zero_terminal_snr(table)
        return cls(
            alphas_cumprod=table,
            prediction_type=config.get("prediction_type", "epsilon"),
            timestep_spacing="lcm" if config.get("_class_name") == "LCMScheduler" else spacing,
            steps_offset=int(config.get("steps_offset", 0)),
        )

    def to_config(self) -> dict[str, Any]:
        """The keys of a diffusers `scheduler_config.json` that describe this schedule; `from_config` reads them back.

        A table that is one of the named schedules at its usual betas is written by name, any other as its betas.
        """
        zero_snr = bool(self.alphas_cumprod[-1] == 0)
        return {
            "num_train_timesteps": self.num_train_timesteps,
            **self._betas_config(zero_snr),
            "rescale_betas_zero_snr": zero_snr,
            "prediction_type": self.prediction_type,
            **({"_class_name": "LCMScheduler"} if self.timestep_spacing == "lcm" else {}),
            "timestep_spacing": "leading" if self.timestep_spacing == "lcm" else self.timestep_spacing,
            "steps_offset": self.steps_offset,
        }

    def _betas_config(self, zero_snr: bool) -> dict[str, Any]:
        size = self.num_train_timesteps
        named = {
            "scaled_linear": (scaled_linear_alphas_cumprod(num_train_timesteps=size), 0.00085, 0.012),
            "linear": (linear_alphas_cumprod(num_train_timesteps=size), 0.0001, 0.02),
            "squaredcos_cap_v2": (cosine_alphas_cumprod(size), 0.0001, 0.02),
        }
        for name, (table, beta_start, beta_end) in named.items():
            if np.allclose(rescale_zero_terminal_snr(table) if zero_snr else table, self.alphas_cumprod, rtol=1e-9):
                return {"beta_schedule": name, "beta_start": beta_start, "beta_end": beta_end}
        alphas = self.alphas_cumprod / np.concatenate([[1.0], self.alphas_cumprod[:-1]])
        return {"trained_betas": (1.0 - alphas).tolist()}
