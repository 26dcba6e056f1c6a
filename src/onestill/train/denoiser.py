"""The UNet as training sees it: built from a recipe, asked for x0, sampled for a sheet.

Shapes: B batch, C latent channels, h w latent size, K tokens, D text width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor

from onestill.errors import CheckpointError, DataError, RecipeError
from onestill.networks.precision import exact_output
from onestill.sampling import SAMPLERS, classifier_free_guidance
from onestill.schedule import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_alphas_cumprod, to_eps, to_x0
from onestill.train.conditioning import Condition, joined
from onestill.train.recipe import option


@dataclass(frozen=True, kw_only=True)
class UNetOptions:
    """diffusers' words for the UNet; `attention` says at which levels, fine to coarse, there is cross-attention.

    `text_in_time` adds the words as a whole, pooled by attention, to the embedding of the timestep, so that they act at
    every resolution and not only where there is cross-attention.
    """

    sample_size: int = option(8, low=2)
    channels: int = option(16, low=1)
    block_out_channels: list[int] = option([128, 256], low=8)
    attention: list[bool] = option([False, True])
    layers_per_block: int = option(1, low=1, high=8)
    head_dim: int = option(32, low=1)
    groups: int = option(16, low=1)
    text_width: int = option(384, low=1)
    text_in_time: bool = option(False)


def build_unet(options: UNetOptions) -> UNet2DConditionModel:
    """A UNet with random weights. Raises RecipeError for sizes that do not fit together."""
    if len(options.attention) != len(options.block_out_channels):
        raise RecipeError("unet.attention needs one true or false for each of unet.block_out_channels.")
    for name, divisor in (("head_dim", options.head_dim), ("groups", options.groups)):
        if any(width % divisor for width in options.block_out_channels):
            raise RecipeError(f"unet.{name} = {divisor} does not divide each of unet.block_out_channels.")
    down = tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in options.attention)
    up = tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(options.attention))
    return UNet2DConditionModel(
        sample_size=options.sample_size,
        in_channels=options.channels,
        out_channels=options.channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=tuple(options.block_out_channels),
        layers_per_block=options.layers_per_block,
        # diffusers' name is a misnomer that it keeps for its old files: for UNets it counts heads.
        attention_head_dim=tuple(width // options.head_dim for width in options.block_out_channels),
        norm_num_groups=options.groups,
        cross_attention_dim=options.text_width,
        addition_embed_type="text" if options.text_in_time else None,
        addition_embed_type_num_heads=max(1, options.text_width // 64),
    )


def check_cached(unet: Any, x0: Tensor, told: Condition) -> None:
    """Raise DataError where a UNet cannot take cached latents [B, C, h, w] or the condition cached with them."""
    config = unet.config
    there, taken = (x0.shape[1], told.text.shape[-1]), (config["in_channels"], config["cross_attention_dim"])
    if there != taken:
        raise DataError(
            f"these shards were cached for another model: their latents have {there[0]} channels and their text is "
            f"{there[1]} wide, and the UNet takes {taken[0]} and {taken[1]}; cache them with this model's parts."
        )
    if config.get("addition_embed_type") == "text_time" and told.pooled is None:
        raise DataError(
            "these shards were cached for another model: they hold no 'pooled', which the UNet takes; "
            "cache them with this model's parts."
        )


def build_like(unet: Any, weights: dict[str, Tensor], device: torch.device) -> Any:
    """A copy of `unet`, a diffusers model, with other weights; for sheets and export."""
    # Without its notes on itself: diffusers would put back defaults in the place of settings registered later.
    made = type(unet).from_config({key: value for key, value in unet.config.items() if not key.startswith("_")})
    made.load_state_dict({name: value.float().cpu() for name, value in weights.items()})
    return made.eval().requires_grad_(False).to(device)


def unet_folder(source: str | Path) -> Path:
    """Where the UNet of `source` lies: a UNet's own folder, or that of a whole model in diffusers' format."""
    inner = Path(source) / "unet"
    return inner if (inner / "config.json").is_file() else Path(source)


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """A trained UNet from its folder, or its model's folder, in diffusers' format."""
    folder = unet_folder(folder)
    try:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(folder)
        return UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no whole UNet2DConditionModel: train a teacher with a 'diffusion' recipe."
        ) from error


def training_schedule() -> NoiseSchedule:
    """The shipped model's: Stable Diffusion's betas rescaled to zero terminal SNR, v-prediction."""
    return NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_alphas_cumprod()), "v_prediction")


def read_schedule(source: str | Path) -> NoiseSchedule:
    """The schedule of the model that a UNet belongs to: the neighbouring `scheduler/`, else this project's own.

    Its timesteps lie trailing, whatever its config says: a one-step model starts from pure noise.
    """
    config = unet_folder(source).parent / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        return training_schedule()
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
        return NoiseSchedule.from_config({**read, "timestep_spacing": "trailing", "steps_offset": 0})
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} is no schedule to train on: {error}") from error


class Denoiser:
    """A UNet together with its schedule: x0 from a noised input, whatever the network itself predicts.

    `extra` in its methods are more arguments of the UNet's call, such as LCM's `timestep_cond` [B, 256].
    """

    def __init__(self, unet: torch.nn.Module, schedule: NoiseSchedule) -> None:
        self.unet, self.schedule = unet, schedule
        exact_output(unet, schedule.prediction_type)
        self._alpha = torch.tensor(schedule.alpha, dtype=torch.float32)
        self._sigma = torch.tensor(schedule.sigma, dtype=torch.float32)

    @property
    def eager(self) -> Denoiser:
        """The same without torch.compile, for sizes that are met once: each would be compiled for."""
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

    def output(self, x: Tensor, timesteps: Tensor, condition: Condition, **extra: Tensor) -> Tensor:
        """What the network says for x [B, C, h, w] at timesteps [B]; float32, whatever it computes in."""
        first = next(self.unet.parameters(), None)
        dtype = torch.float32 if first is None else first.dtype
        told = condition.cast(dtype)
        return self.unet(x.to(dtype), timesteps, told.text, **told.added, **extra).sample.float()  # type: ignore[no-any-return]

    def x0(self, x: Tensor, timesteps: Tensor, condition: Condition, **extra: Tensor) -> Tensor:
        """The network's estimate of the clean latents [B, C, h, w]."""
        output = self.output(x, timesteps, condition, **extra)
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
            empty: the condition of the empty prompt, for one picture.
            scale: a number, where 1 asks the network once; or one for each picture, [B, 1, 1, 1].
        """
        if isinstance(scale, float) and scale == 1.0:
            return self.x0(x, timesteps, condition)
        both = joined(condition, empty.expand(len(x)).sized(condition))
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
        extra: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Latents [B, C, h, w] for B prompts, drawn with seeds `seed`, `seed + 1`, ...

        Args:
            shape: (C, h, w).
            sampler: a name in `onestill.sampling.SAMPLERS`; "" is Euler ancestral for few steps, DDIM from ten on.
        """
        count, device, eager = len(condition.text), condition.text.device, self.eager
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]

        def draw(_step: int) -> Tensor:
            return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)

        def predict_x0(x: Tensor, timestep: int) -> Tensor:
            at = torch.full((len(x),), timestep, device=x.device)
            if extra:
                return eager.x0(x, at, condition, **extra)
            return eager.guided_x0(x, at, condition, empty, scale)

        name = sampler or ("ddim" if steps >= 10 else "euler_ancestral")
        noise, timesteps = draw(0), self.schedule.timesteps(steps)
        return SAMPLERS[name](predict_x0, noise, self.schedule, timesteps, draw)  # type: ignore[no-any-return]
