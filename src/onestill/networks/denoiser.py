"""The UNet with its schedule: loaded from a folder, called, asked for x0 or eps, sampled. `[torch]`

Shapes: B batch, C latent channels, h w latent size, K tokens, D text width, P width of a pooled text embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from onestill.checkpoint.scheduler_config import EDM, with_defaults
from onestill.errors import CheckpointError, ScheduleError
from onestill.networks.condition import Condition, added_cond_kwargs, concatenated
from onestill.networks.libraries import open_whole
from onestill.networks.precision import exact_output
from onestill.sampling import SAMPLERS, classifier_free_guidance
from onestill.schedule import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_alphas_cumprod, to_eps, to_x0

__all__ = [
    "Denoiser",
    "call_unet",
    "copy_with_weights",
    "guidance_embedding",
    "load_unet",
    "read_schedule",
    "training_schedule",
    "unet_folder",
]


def call_unet(
    unet: Any,
    x: Tensor,
    timesteps: Tensor | float,
    text: Tensor,
    pooled: Tensor | None = None,
    sizes: Tensor | None = None,
    guidance_scale: Tensor | float | None = None,
) -> Tensor:
    """A UNet's output for latents x [B, C, h, w], of the same shape and in the UNet's own type.

    Args:
        unet: a UNet2DConditionModel, compiled or not.
        timesteps: one for all, or [B].
        text, pooled, sizes: as in `Condition`, in the UNet's type; sizes may stay in float32.
        guidance_scale: one for all or [B], for a UNet with a guidance embedding (LCM); others ignore it.
    """
    options = added_cond_kwargs(pooled, sizes)
    if guidance_scale is not None and (width := unet.config.get("time_cond_proj_dim")):
        embedding = guidance_embedding(guidance_scale, width, x.device)
        options["timestep_cond"] = embedding.to(x.dtype).expand(len(x), -1)
    output: Tensor = unet(x, timesteps, text, return_dict=False, **options)[0]
    return output


def guidance_embedding(guidance_scale: Tensor | float, width: int, device: torch.device) -> Tensor:
    """Sines, then cosines of 1000 (w - 1) for guidance scales w (Luo et al. 2023, arXiv 2310.04378).

    Args:
        guidance_scale: a number, [] or [B]; tensors are on `device`.
        width: of the embedding; even.
        device: where it is made. A CUDA graph allows no copy to it.

    Returns:
        [1, width] or [B, width], float32.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=device) * (-math.log(10000.0) / (half - 1)))
    weight = guidance_scale - 1.0
    if isinstance(weight, Tensor):
        weight = weight.float().reshape(-1, 1)
    angles = (1000.0 * weight * rates).reshape(-1, half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def copy_with_weights(network: Any, weights: dict[str, Tensor], device: torch.device) -> Any:
    """A frozen copy of a network of diffusers in evaluation mode, with other weights, in float32."""
    # Without the config's notes on itself: by them diffusers puts defaults in the place of settings registered later.
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    copied = type(network).from_config(config)
    copied.load_state_dict({name: value.float().cpu() for name, value in weights.items()})
    return copied.eval().requires_grad_(False).to(device)


def unet_folder(source: str | Path) -> Path:
    """The folder of the UNet in `source`: itself, or `unet/` where it is a whole model in diffusers' format."""
    inner = Path(source) / "unet"
    return inner if (inner / "config.json").is_file() else Path(source)


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """A trained UNet from its folder, or its model's folder, in diffusers' format.

    Raises:
        CheckpointError: the folder holds no such network.
    """
    folder = unet_folder(folder)
    try:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(folder)
        unet: UNet2DConditionModel = open_whole(UNet2DConditionModel, folder)
        return unet
    except Exception as error:  # of files that are damaged the libraries raise anything
        raise CheckpointError(
            f"{folder} holds no whole UNet2DConditionModel: train a teacher with a 'diffusion' recipe."
        ) from error


def training_schedule() -> NoiseSchedule:
    """The shipped model's: Stable Diffusion's betas rescaled to zero terminal SNR, v-prediction."""
    return NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_alphas_cumprod()), "v_prediction")


def read_schedule(source: str | Path) -> NoiseSchedule:
    """The schedule of the model that a UNet belongs to: the neighbouring `scheduler/`, else this project's own.

    Its timestep spacing is trailing, whatever its config says: a one-step model starts from pure noise.

    Raises:
        CheckpointError: the config is damaged, or is a schedule that cannot be trained on.
    """
    config = unet_folder(source).parent / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        return training_schedule()
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
        known = with_defaults(read) if "_class_name" in read else read
        if known.get("_class_name") in EDM:
            raise ScheduleError("its noise levels are EDM's")
        return NoiseSchedule.from_config({**known, "timestep_spacing": "trailing", "steps_offset": 0})
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{config} is no schedule to train on: {error}") from error


class Denoiser:
    """A UNet together with its schedule: x0 from a noised input, whatever the network itself predicts.

    `guidance_scale` in its methods, a tensor [B], is for UNets with a guidance embedding (LCM); None for others.
    """

    def __init__(self, unet: torch.nn.Module, schedule: NoiseSchedule) -> None:
        self.unet, self.schedule = unet, schedule
        exact_output(unet, schedule.prediction_type)
        self._alpha = torch.tensor(schedule.alpha, dtype=torch.float32)
        self._sigma = torch.tensor(schedule.sigma, dtype=torch.float32)

    @property
    def eager(self) -> Denoiser:
        """The same without torch.compile, which would compile anew for a size that occurs once."""
        return Denoiser(getattr(self.unet, "_orig_mod", self.unet), self.schedule)

    @property
    def last(self) -> int:
        """The timestep of pure noise, 999."""
        return self.schedule.num_train_timesteps - 1

    def signal(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at timesteps [B], each [B, 1, 1, 1]."""
        if self._alpha.device != timesteps.device:  # once: each copy is a wait for a GPU
            self._alpha, self._sigma = self._alpha.to(timesteps.device), self._sigma.to(timesteps.device)
        return self._alpha[timesteps].view(-1, 1, 1, 1), self._sigma[timesteps].view(-1, 1, 1, 1)

    def output(
        self, x: Tensor, timesteps: Tensor, condition: Condition, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """The network's output for x [B, C, h, w] at timesteps [B]; float32, whatever it computes in."""
        first = next(self.unet.parameters(), None)
        dtype = torch.float32 if first is None else first.dtype
        given = condition.cast(dtype)
        return call_unet(
            self.unet, x.to(dtype), timesteps, given.text, given.pooled, given.sizes, guidance_scale
        ).float()

    def x0(self, x: Tensor, timesteps: Tensor, condition: Condition, guidance_scale: Tensor | None = None) -> Tensor:
        """The network's estimate of the clean latents [B, C, h, w]."""
        output = self.output(x, timesteps, condition, guidance_scale)
        return to_x0(output, x, *self.signal(timesteps), self.schedule.prediction_type)  # type: ignore[no-any-return]

    def eps(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The network's estimate of the noise [B, C, h, w]."""
        output = self.output(x, timesteps, condition)
        return to_eps(output, x, *self.signal(timesteps), self.schedule.prediction_type)  # type: ignore[no-any-return]

    def guided_x0(
        self, x: Tensor, timesteps: Tensor, condition: Condition, empty: Condition, scale: float | Tensor
    ) -> Tensor:
        """x0 with classifier-free guidance.

        Args:
            empty: the condition of the empty prompt, for one image.
            scale: a number, where 1 calls the network once; or one for each image, [B, 1, 1, 1].
        """
        if isinstance(scale, float) and scale == 1.0:
            return self.x0(x, timesteps, condition)
        both = concatenated(condition, empty.expand(len(x)).sized(condition))
        cond, uncond = self.x0(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both).chunk(2)
        return classifier_free_guidance(cond, uncond, scale)  # type: ignore[no-any-return, arg-type]

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        empty: Condition,
        shape: Sequence[int],
        steps: int,
        scale: float = 1.0,
        seed: int = 0,
        sampler: str = "",
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, C, h, w] for B prompts, sampled with seeds `seed`, `seed + 1`, ...

        Args:
            shape: (C, h, w).
            steps: how many calls of the network.
            scale: of classifier-free guidance; 1 is none.
            sampler: a name in `onestill.sampling.SAMPLERS`; "" is Euler ancestral for few steps, DDIM from ten on.
            guidance_scale: where it is given, it takes the place of classifier-free guidance.
        """
        count, device, eager = len(condition.text), condition.text.device, self.eager
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]

        def draw(_step: int) -> Tensor:
            return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)

        def predict_x0(x: Tensor, timestep: int) -> Tensor:
            at = torch.full((len(x),), timestep, device=x.device)
            if guidance_scale is not None:
                return eager.x0(x, at, condition, guidance_scale)
            return eager.guided_x0(x, at, condition, empty, scale)

        name = sampler or ("ddim" if steps >= 10 else "euler_ancestral")
        noise, timesteps = draw(0), self.schedule.timesteps(steps)
        return SAMPLERS[name](predict_x0, noise, self.schedule, timesteps, draw)  # type: ignore[no-any-return]
