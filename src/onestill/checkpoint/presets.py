"""How a model was made to draw in few steps, as what must be known to draw with it.

The keys of a file do not show it: SDXL and SDXL Turbo have the same tensors. A folder's scheduler config does. A single
file is taken for a Turbo model unless a preset is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onestill.errors import OnestillError, near
from onestill.schedule import PredictionType, TimestepSpacing


@dataclass(frozen=True)
class Preset:
    """What to draw with unless asked otherwise.

    Attributes:
        num_inference_steps, guidance_scale: a guidance of 1 is none.
        sampler: the name in `onestill.sampling.SAMPLERS`.
        spacing: how timesteps are chosen.
        prediction_type: what the network's output is; None leaves what is known otherwise.
        unit_noise: whether drawing starts from noise of variance 1 rather than sigma^2, as the model's authors do.
        timesteps: number of steps -> the timesteps to take, where they follow no rule.
    """

    num_inference_steps: int
    guidance_scale: float
    sampler: str
    spacing: TimestepSpacing
    prediction_type: PredictionType | None = None
    unit_noise: bool = False
    timesteps: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    # Sauer et al. 2023. Its own configs: SDXL Turbo by ancestral Euler, SD Turbo by Euler; one step is one step.
    "turbo": Preset(1, 1.0, "euler_ancestral", "trailing"),
    # Lin, Wang and Yang 2024: 2, 4 or 8 steps; the one-step network gives x0 itself.
    "lightning": Preset(4, 1.0, "euler", "trailing"),
    "lightning-x0": Preset(1, 1.0, "euler", "trailing", "sample"),
    # Luo et al. 2023, both whole models and LoRAs.
    "lcm": Preset(4, 1.0, "consistency", "lcm", unit_noise=True),
    # Yin et al. 2024: four steps, or one that was trained at timestep 399.
    "dmd2": Preset(4, 1.0, "consistency", "trailing", unit_noise=True, timesteps={1: (399,), 4: (999, 749, 499, 249)}),
    # Not distilled: many steps with guidance.
    "base": Preset(25, 5.0, "dpmpp_2m", "leading", unit_noise=True),
}


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        OnestillError: there is none.
    """
    if name not in PRESETS:
        raise OnestillError(f"There is no preset '{name}'; choose from {', '.join(PRESETS)}.{near(name, PRESETS)}")
    return PRESETS[name]
