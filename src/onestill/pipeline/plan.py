"""The settings that all images of a call share, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestill import __version__
from onestill.errors import ScheduleError, StepsError
from onestill.pipeline.checks import MOST_STEPS, checked_guidance, checked_pair, checked_size, checked_whole
from onestill.pipeline.loaded import LoadedInfo
from onestill.sampling import strength_timesteps


@dataclass(frozen=True)
class Plan:
    """The checked settings of a call.

    Attributes:
        info: the model's.
        num_inference_steps: as it was asked for, or the model's own.
        timesteps: falling, each one call of the network; fewer than the steps where `strength` is below 1. None of
            them where `scheduler` chooses.
        guidance_scale: 1 is none.
        sampler: one of `onestill.sampling.SAMPLERS`, or the class of `scheduler`.
        scheduler: the config of diffusers' scheduler that draws; empty where a sampler of ours does.
        height, width: pixels.
        strength: of image to image, else None.
        micro_conditioning: SDXL's six numbers; None for other models.
    """

    info: LoadedInfo
    num_inference_steps: int
    timesteps: tuple[int, ...]
    guidance_scale: float
    sampler: str
    scheduler: Mapping[str, Any]
    height: int
    width: int
    strength: float | None
    micro_conditioning: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        info: LoadedInfo,
        *,
        steps: int | None,
        guidance_scale: float | None,
        height: int | None,
        width: int | None,
        sampler: str | None,
        strength: float | None,
        micro_conditioning: Mapping[str, tuple[int, int] | None],
    ) -> Plan:
        """Check each setting; None is the model's own, of SDXL's micro-conditioning the size of the image.

        Raises:
            SizeError, StepsError: a setting is out of its range.
        """
        steps = checked_whole("num_inference_steps", info.num_inference_steps if steps is None else steps, MOST_STEPS)
        scheduler = info.scheduler if sampler in (None, info.sampler) else {}
        timesteps = [] if scheduler else info.timesteps(steps)
        if info.sampler.startswith("EDM") and not scheduler:
            raise ScheduleError(f"The noise levels of '{info.name}' are EDM's; leave out the sampler.")
        if scheduler and strength is not None:
            _check_strength(strength, steps)
        elif strength is not None:
            timesteps = strength_timesteps(timesteps, strength, info.schedule.num_train_timesteps)
        size = checked_size(height, width, info)
        numbers = [number for name, pair in micro_conditioning.items() for number in checked_pair(name, pair, size)]
        return cls(
            info=info,
            num_inference_steps=steps,
            timesteps=tuple(timesteps),
            guidance_scale=checked_guidance(info.guidance_scale if guidance_scale is None else guidance_scale),
            sampler=sampler or info.sampler,
            scheduler=scheduler,
            height=size[0],
            width=size[1],
            strength=strength,
            micro_conditioning=tuple(numbers) if info.is_xl else None,
        )

    @property
    def guides(self) -> bool:
        """Whether guidance steers away from a negative prompt, at twice the work."""
        return self.guidance_scale > 1 and not self.info.embeds_guidance

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of one image's latents."""
        factor = self.info.vae_scale_factor
        return self.info.latent_shape[0], self.height // factor, self.width // factor

    def time_ids(self, count: int) -> NDArray[np.float32] | None:
        """SDXL's numbers for each of `count` prompts, [count, 6]; None for other models."""
        if self.micro_conditioning is None:
            return None
        return np.tile(np.array(self.micro_conditioning, dtype=np.float32), (count, 1))

    def metadata(self, negative_prompt: str | None, *, is_masked: bool) -> dict[str, str]:
        """What an image is drawn with beside its prompt and seed, as written into its file."""
        info = self.info
        return {
            "num_inference_steps": str(self.num_inference_steps),
            "sampler": self.sampler,
            "guidance_scale": f"{self.guidance_scale:g}",
            **({"negative_prompt": negative_prompt} if self.guides and negative_prompt else {}),
            **({"strength": f"{self.strength:g}"} if self.strength is not None else {}),
            **({"mask": "yes"} if is_masked else {}),
            "size": f"{self.width}x{self.height}",
            "model": f"{info.name} {info.version}".strip(),
            "engine": f"{info.engine} {info.dtype}",
            "version": f"onestill {__version__}",
        }


def _check_strength(strength: float, steps: int) -> None:
    """Refuse what diffusers' schedulers cannot start from; samplers of ours have a step at every noise level."""
    strength_timesteps([0], strength)
    if round(strength * steps, 6) < 1:
        raise StepsError(
            f"A strength of {strength:g} is less than one of {steps} steps; take at least {math.ceil(1 / strength)}."
        )
