"""What a scheduler of diffusers means here: drawn by a sampler of `onestill.sampling`, by diffusers itself, or refused.

A sampler of ours stands for a scheduler only where both give the same latents; `OURS` says for which values. All other
values, and the other classes of `DRAWN`, are computed by diffusers' own class (`onestill.networks.scheduler`), which
needs `[torch]`. A class in neither is for other models than Stable Diffusion's, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from onestill.checkpoint.header import read_header
from onestill.errors import OnestillError, ScheduleError, near
from onestill.schedule import NoiseSchedule

# Stable Diffusion's schedule, which a single file does not hold: every model of these families was trained on it.
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
LEADING = {"timestep_spacing": "leading"}
LINSPACE = {"timestep_spacing": "linspace"}
CONSISTENCY = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **LEADING}
# Every class that Stable Diffusion is drawn with -> its defaults where they are not those of `NoiseSchedule`.
DRAWN: Mapping[str, Mapping[str, Any]] = {
    "DDIMParallelScheduler": LEADING,
    "DDIMScheduler": LEADING | {"clip_sample": True},
    "DDPMParallelScheduler": LEADING,
    "DDPMScheduler": LEADING,
    "DEISMultistepScheduler": LINSPACE,
    "DPMSolverMultistepScheduler": LINSPACE,
    "DPMSolverSinglestepScheduler": LINSPACE,
    "EulerAncestralDiscreteScheduler": LINSPACE,
    "EulerDiscreteScheduler": LINSPACE,
    "HeunDiscreteScheduler": LINSPACE,
    "KDPM2AncestralDiscreteScheduler": LINSPACE,
    "KDPM2DiscreteScheduler": LINSPACE,
    "LCMScheduler": CONSISTENCY,
    "LMSDiscreteScheduler": LINSPACE,
    "PNDMScheduler": LEADING,
    "SASolverScheduler": LINSPACE,
    "TCDScheduler": CONSISTENCY,
    "UniPCMultistepScheduler": LINSPACE,
    **{name: {"sigma_min": 0.002, "sigma_max": 80.0} for name in EDM},
}
OFF = (False, None)
OTHER_SIGMAS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), OFF)
# Class -> our sampler, and the values for which both are the same; a field that is not here changes nothing.
OURS: Mapping[str, tuple[str, Mapping[str, tuple[Any, ...]]]] = {
    # With other spacings, diffusers' next timestep is not the next one that is drawn at.
    "DDIMScheduler": (
        "ddim",
        {"timestep_spacing": ("leading",), "clip_sample": OFF, "set_alpha_to_one": (True,), "thresholding": OFF},
    ),
    # Leading is counted in n + 1 parts here, and zero terminal SNR is rounded up to 2^-24, which a second order feels.
    "DPMSolverMultistepScheduler": (
        "dpmpp_2m",
        {
            "timestep_spacing": ("trailing",),
            "solver_order": (2,),
            "thresholding": OFF,
            "algorithm_type": ("dpmsolver++",),
            "solver_type": ("midpoint",),
            "lower_order_final": (True,),
            "euler_at_final": OFF,
            **OTHER_SIGMAS,
            "use_lu_lambdas": OFF,
            "final_sigmas_type": ("zero",),
            "lambda_min_clipped": (-math.inf,),
            "variance_type": (None,),
            "rescale_betas_zero_snr": OFF,
            "use_dynamic_shifting": OFF,
        },
    ),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", {"timestep_spacing": ("trailing", "leading")}),
    "EulerDiscreteScheduler": (
        "euler",
        {
            "timestep_spacing": ("trailing", "leading"),
            "interpolation_type": ("linear",),
            **OTHER_SIGMAS,
            "sigma_min": (None,),
            "sigma_max": (None,),
            "timestep_type": ("discrete",),
            "final_sigmas_type": ("zero",),
        },
    ),
    "LCMScheduler": (
        "consistency",
        {"original_inference_steps": (50,), "clip_sample": OFF, "thresholding": OFF, "timestep_scaling": (10.0,)},
    ),
}
PLAYGROUND = {"_class_name": EDM[0], "prediction_type": "epsilon", "sigma_min": 0.002, "sigma_max": 80.0}
COSXL = {
    "_class_name": EDM[1],
    "prediction_type": "v_prediction",
    "sigma_min": 0.002,
    "sigma_max": 120.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
}
# What a person may say of a model whose files do not: what its output means, and at which noise levels.
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "eps": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False},
    "v-zsnr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "x0": {"prediction_type": "sample"},
    "edm": PLAYGROUND,
    "edm-v": COSXL,
}


class Sampling(NamedTuple):
    """How a model is sampled.

    Attributes:
        schedule: the noise schedule that it was trained on.
        sampler: the name in `onestill.sampling.SAMPLERS`, or the class of diffusers that draws.
        unit_noise: whether drawing starts from noise of variance 1 rather than sigma^2.
        scheduler: the config of that class; empty where a sampler of ours draws.
    """

    schedule: NoiseSchedule
    sampler: str
    unit_noise: bool
    scheduler: Mapping[str, Any]


def with_defaults(config: Mapping[str, Any], kind: str | None = None) -> dict[str, Any]:
    """A scheduler's config with its class's own defaults for what it leaves out.

    Args:
        config: as in `scheduler_config.json`.
        kind: the class; None is the config's own.

    Raises:
        ScheduleError: the class is not one that Stable Diffusion is drawn with.
    """
    kind = str(kind or config.get("_class_name"))
    if kind not in DRAWN:
        raise ScheduleError(
            f"The scheduler {kind} does not draw Stable Diffusion's models; give the model one of {', '.join(DRAWN)}."
        )
    unknown = set(config.get("_use_default_values", ()))
    return {
        **DRAWN[kind],
        **{name: value for name, value in config.items() if name not in unknown},
        "_class_name": kind,
    }


def read_scheduler(config: Mapping[str, Any], *, is_xl: bool) -> Sampling:
    """What a scheduler's config means.

    Args:
        config: as `with_defaults` gives it.
        is_xl: whether it belongs to an SDXL pipeline; those of other families change two values, as here.

    Raises:
        ScheduleError: nothing can be drawn by it.
    """
    kind = str(config["_class_name"])
    if not is_xl:
        config = {**config, "steps_offset": 1, "clip_sample": False}
    if str(config.get("variance_type")).startswith("learned"):
        raise ScheduleError("Stable Diffusion's UNets give no learned variance; set variance_type to null.")
    if kind in EDM:
        return Sampling(_edm_schedule(config), kind, True, config)
    schedule = NoiseSchedule.from_config(config)
    sampler, values = OURS.get(kind, (kind, {}))
    is_ours = kind in OURS and all(config[name] in same for name, same in values.items() if name in config)
    unit_noise = not kind.startswith("Euler") or schedule.timestep_spacing == "leading"
    return Sampling(schedule, sampler if is_ours else kind, unit_noise, {} if is_ours else config)


def _edm_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """EDM's noise levels (Karras et al. 2022), x = x0 + sigma eps, as a table; its timesteps are ln(sigma) / 4."""
    size, lowest, highest = (config.get("num_train_timesteps", 1000), config["sigma_min"], config["sigma_max"])
    if config.get("sigma_schedule") == "exponential":
        sigmas = np.geomspace(lowest, highest, size)
    else:
        rho = config.get("rho", 7.0)
        sigmas = np.linspace(lowest ** (1 / rho), highest ** (1 / rho), size) ** rho
    return NoiseSchedule(1 / (1 + sigmas**2), config.get("prediction_type", "epsilon"))


def scheduled(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A scheduler's config with what a person says of it by a name in `SCHEDULES`.

    Raises:
        OnestillError: there is no such name.
    """
    if name not in SCHEDULES:
        raise OnestillError(
            f"There is no schedule '{name}'; choose from {', '.join(SCHEDULES)}.{near(name, SCHEDULES)}"
        )
    given = SCHEDULES[name]
    if "_class_name" in given:
        return dict(given)
    if config.get("_class_name") in EDM:
        config = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "trailing"}
    return {**config, **given}


# --- what tensors in a single file say ------------------------------------------------------------------------------


def marked_schedule(path: Any) -> str:
    """The name in `SCHEDULES` that a single file's own markers mean; "" where it has none.

    Trainers add tensors whose names alone tell loaders how to draw: `v_pred` and `ztsnr` of NoobAI and its like,
    `edm_mean` of Playground 2.5, `edm_vpred.sigma_max` of CosXL.
    """
    names = read_header(path).tensors
    if any(name.startswith("edm_vpred.") for name in names):
        return "edm-v"
    if "edm_mean" in names:
        return "edm"
    if "v_pred" in names:
        return "v-zsnr" if "ztsnr" in names else "v"
    return "v" if read_header(path).notes.get("modelspec.prediction_type") == "v" else ""
