"""Sampling by diffusers' own schedulers, for those that no sampler of `onestill.sampling` equals. `[torch]`

Latents are in the scheduler's own coordinates here, which differ from class to class.

Shapes: B images, C latent channels, h w latent size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray

from onestill.errors import ScheduleError, StepsError
from onestill.networks.libraries import quiet_libraries
from onestill.sampling import blend

Predict = Callable[[NDArray[np.float32], float], NDArray[np.float32]]  # (x [B, C, h, w], timestep) -> the output


class DiffusersScheduler:
    """One scheduler; each call has a copy of it, as it changes while it draws. Making one takes up to a second.

    Args:
        config: with its `_class_name`, one of `onestill.checkpoint.scheduler_config.DRAWN`.

    Raises:
        ScheduleError: diffusers refuses the config, or lacks a package for it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._name = name = config["_class_name"]
        try:
            with quiet_libraries():
                self._scheduler = getattr(diffusers, name).from_config(dict(config))
        except (ImportError, NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise ScheduleError(
                f"diffusers cannot make this {name} ({_first_line(error)}); choose a preset, or another scheduler."
            ) from error

    def sample(
        self,
        predict: Predict,
        seeds: Sequence[int],
        shape: Sequence[int],
        num_inference_steps: int,
        start: NDArray[np.float32] | None = None,
        strength: float | None = None,
        mask: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Latents [B, C, h, w] for B seeds, as diffusers' pipelines draw them.

        Args:
            predict: the network; timesteps are whole numbers or not, by the scheduler.
            seeds: one for each image.
            shape: (C, h, w).
            num_inference_steps: before `strength` takes its share.
            start: [1, C, h, w], latents of an image to start from, or None.
            strength: the share of the steps that changes `start`.
            mask: [1, 1, h, w], 1 where to draw and 0 where `start` stays, blended in after each step as diffusers'
                inpainting pipelines do; None to draw everywhere.

        Raises:
            StepsError: the scheduler cannot take so many steps.
        """
        scheduler = copy.deepcopy(self._scheduler)
        try:
            scheduler.set_timesteps(num_inference_steps)
        except (AttributeError, ValueError, IndexError, RuntimeError, TypeError) as error:
            raise StepsError(
                f"{self._name} cannot take {num_inference_steps} steps ({_first_line(error)}); choose another number."
            ) from error
        generators = [torch.Generator("cpu").manual_seed(seed % 2**32) for seed in seeds]
        x = randn_tensor((len(seeds), *shape), generator=generators, dtype=torch.float32)
        left_out = 0 if start is None else num_inference_steps - int(round(num_inference_steps * (strength or 1), 6))
        timesteps = scheduler.timesteps[left_out * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(left_out * scheduler.order)
        noise, image = x, x if start is None else torch.from_numpy(start).expand_as(x)
        if start is None:
            x = x * scheduler.init_noise_sigma
        else:
            x = scheduler.add_noise(image, noise, timesteps[:1].repeat(len(seeds)))
        taken = inspect.signature(scheduler.step).parameters
        # As the pipelines call it: with their own eta of 0, which is not every class's.
        options = {name: value for name, value in (("generator", generators), ("eta", 0.0)) if name in taken}
        for step, timestep in enumerate(timesteps):
            output = predict(scheduler.scale_model_input(x, timestep).numpy(), timestep.item())
            try:
                x = scheduler.step(torch.from_numpy(output), timestep, x, **options, return_dict=False)[0]
            except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                raise ScheduleError(
                    f"diffusers' {self._name} cannot take a step with its config "
                    f"({_first_line(error)}); choose a preset, or another scheduler."
                ) from error
            if mask is not None:
                following = timesteps[step + 1 : step + 2].repeat(len(seeds))
                kept = scheduler.add_noise(image, noise, following) if len(following) else image
                x = blend(torch.from_numpy(mask), x, kept)
        found: NDArray[np.float32] = x.float().numpy()
        return found


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
