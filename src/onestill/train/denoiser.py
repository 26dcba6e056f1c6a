"""The UNet as training sees it: built from a recipe, asked for x0, sampled for a sheet.

Shapes: B batch, C latent channels, h w latent size, K tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor

from onestill.errors import CheckpointError, RecipeError
from onestill.sampling import classifier_free_guidance, sample_ddim, sample_euler_ancestral
from onestill.schedule import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_alphas_cumprod, to_x0
from onestill.train.recipe import option


@dataclass(frozen=True, kw_only=True)
class UNetOptions:
    """diffusers' words for the UNet; `attention` says at which levels, fine to coarse, there is cross-attention."""

    sample_size: int = option(8, low=2)
    channels: int = option(16, low=1)
    block_out_channels: list[int] = option([128, 256], low=8)
    attention: list[bool] = option([False, True])
    layers_per_block: int = option(1, low=1, high=8)
    head_dim: int = option(32, low=1)
    groups: int = option(16, low=1)
    text_width: int = option(384, low=1)


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
    )


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """A trained UNet from its folder in diffusers' format."""
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


class Denoiser:
    """A UNet together with its schedule: x0 from a noised input, whatever the network itself predicts."""

    def __init__(self, unet: torch.nn.Module, schedule: NoiseSchedule) -> None:
        self.unet, self.schedule = unet, schedule
        self._alpha = torch.tensor(schedule.alpha, dtype=torch.float32)
        self._sigma = torch.tensor(schedule.sigma, dtype=torch.float32)

    def signal(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at timesteps [B], each [B, 1, 1, 1]."""
        at = timesteps.cpu()
        shape = (-1, 1, 1, 1)
        return self._alpha[at].view(shape).to(timesteps.device), self._sigma[at].view(shape).to(timesteps.device)

    def output(self, x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """What the network says for x [B, C, h, w] at timesteps [B] with text [B, K, D]; float32."""
        return self.unet(x, timesteps, text).sample.float()  # type: ignore[no-any-return]

    def x0(self, x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The network's estimate of the clean latents [B, C, h, w]."""
        alpha, sigma = self.signal(timesteps)
        prediction = self.schedule.prediction_type
        return to_x0(self.output(x, timesteps, text), x, alpha, sigma, prediction)  # type: ignore[no-any-return]

    def guided_x0(self, x: Tensor, timesteps: Tensor, text: Tensor, empty: Tensor, scale: float) -> Tensor:
        """x0 with classifier-free guidance; `empty` [1, K, D] are the states of the empty prompt."""
        if scale == 1.0:
            return self.x0(x, timesteps, text)
        both = torch.cat([text, empty.expand_as(text)])
        cond, uncond = self.x0(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both).chunk(2)
        return classifier_free_guidance(cond, uncond, scale)  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(
        self, text: Tensor, empty: Tensor, shape: Sequence[int], steps: int, scale: float = 1.0, seed: int = 0
    ) -> Tensor:
        """Latents [B, C, h, w] for text [B, K, D]: one step or Euler ancestral for few, DDIM from ten on."""
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(text))]

        def draw(_step: int) -> Tensor:
            return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(text.device)

        def predict_x0(x: Tensor, timestep: int) -> Tensor:
            at = torch.full((len(x),), timestep, device=x.device)
            return self.guided_x0(x, at, text, empty, scale)

        noise, timesteps = draw(0), self.schedule.timesteps(steps)
        if steps >= 10:
            return sample_ddim(predict_x0, noise, self.schedule, timesteps)  # type: ignore[no-any-return]
        return sample_euler_ancestral(predict_x0, noise, self.schedule, timesteps, draw)  # type: ignore[no-any-return]
