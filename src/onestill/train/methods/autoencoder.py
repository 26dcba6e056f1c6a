"""The autoencoder: pictures to small latents and back, with edges that stay sharp.

Reconstruction (L1), image gradients and, where its network is given, LPIPS from the first step; a patch discriminator
on top once the picture stands. The latents get a little noise on the way to the decoder, so that it forgives a
denoiser's errors, and a penalty that holds each channel near zero mean and unit variance, so that noise of variance 1
means the same for all of them.

Shapes: B batch, H W pixels, C latent channels, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor, nn

from onestill.errors import RecipeError
from onestill.networks.denoiser import copy_with_weights
from onestill.networks.latents import load_autoencoder, most_likely_latents, to_uint8
from onestill.train.discriminator.heads import PatchDiscriminator
from onestill.train.export import save_averaged
from onestill.train.losses import gradient_difference, hinge_discriminator, hinge_generator, unit_moments
from onestill.train.lpips import LPIPS
from onestill.train.optim.adam import adamw
from onestill.train.optim.step import Batch, Objectives
from onestill.train.recipe import LoopOptions, option
from onestill.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How a decoder is judged.

    `l1` weighs the difference of pixels, `gradient` that of their horizontal and vertical differences. `perceptual`
    weighs LPIPS by the network in the file `perceptual_network`, on one random window of `perceptual_window` px of each
    picture, edges included. `latent_noise` is the standard deviation of noise on the latents that are decoded.
    """

    l1: float = option(1.0, low=0.0)
    gradient: float = option(1.0, low=0.0)
    perceptual: float = option(0.0, low=0.0)
    perceptual_network: str = option("")
    perceptual_window: int = option(64, low=16, high=4096)
    latent_noise: float = option(0.05, low=0.0, high=1.0)
    discriminator_width: int = option(32, low=4)
    discriminator_lr: float = option(5e-4, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class Options(LossOptions):
    """Sizes of the network (blocks from full resolution to the smallest, for both halves) and weights of the losses.

    `start` names an autoencoder's folder to go on from instead of random weights; it must have these sizes.
    `moments` weighs how far each latent channel is from zero mean and unit variance. `adversarial_from` is the
    iteration at which the patch discriminator joins; its weight 0 leaves it out. The first `adversarial_warmup`
    iterations after that train the discriminator alone.
    """

    start: str = option("")
    kind: str = option("tiny", choices=("tiny", "kl"))
    latent_channels: int = option(16, low=1, high=256)
    widths: list[int] = option([16, 32, 64, 128, 192], low=8)
    layers_per_block: int = option(1, low=1, high=8)
    encoder_width: int = option(32, low=4)
    decoder_width: int = option(48, low=4)
    encoder_blocks: list[int] = option([0, 0, 2, 3, 4], low=0, high=32)
    decoder_blocks: list[int] = option([4, 4, 3, 0, 0], low=0, high=32)
    lr: float = option(1e-3, low=0.0, high=1.0)
    moments: float = option(0.01, low=0.0)
    adversarial: float = option(0.0, low=0.0)
    adversarial_from: int = option(2000, low=0)
    adversarial_warmup: int = option(100, low=0)


class Method:
    averaged: tuple[str, ...] = ("autoencoder",)
    batch = "images"
    splits = False

    def __init__(self, options: Options, loop: LoopOptions) -> None:
        torch.manual_seed(loop.seed)
        self.options, self.loop = options, loop
        self.autoencoder = build(options)
        if options.start:
            continue_from(options.start, self.autoencoder)
        self.discriminator = PatchDiscriminator(options.discriminator_width)
        self.lpips = perceptual(options.perceptual, options.perceptual_network)
        self.networks: dict[str, nn.Module] = {"autoencoder": self.autoencoder, "discriminator": self.discriminator}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "autoencoder": adamw(self.autoencoder, options.lr),
            "discriminator": adamw(self.discriminator, options.discriminator_lr, beta1=0.5),
        }
        self._shown: Tensor | None = None
        self._captions: list[str] = []

    def to(self, device: torch.device) -> None:
        for network in (*self.networks.values(), *([self.lpips] if self.lpips else [])):
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step(self, state: TrainState, batch: Batch) -> Objectives:
        options = self.options
        device = next(self.autoencoder.parameters()).device
        x = batch["images"].to(device).contiguous(memory_format=torch.channels_last)  # [B, 3, H, W] in [-1, 1]
        if self._shown is None:
            self._shown, self._captions = x[:8].clone(), list(batch["captions"][:8])
        latents = most_likely_latents(self.autoencoder, x)  # [B, C, h, w]
        noise = state.draw.normal(*latents.shape).to(device)
        y = self.autoencoder.decode(latents + options.latent_noise * noise).sample  # [B, 3, H, W]

        l1, edges, moments = (y - x).abs().mean(), gradient_difference(x, y), unit_moments(latents)
        loss = options.l1 * l1 + options.gradient * edges + options.moments * moments
        metrics = {"l1": l1, "edges": edges, "moments": moments, "psnr": -10 * torch.log10((y - x).square().mean() / 4)}

        if self.lpips is not None:
            rows, columns = window(x.shape[-1], options.perceptual_window, state)
            metrics["perceptual"] = self.lpips(x[:, :, rows, columns], y[:, :, rows, columns]).mean()
            loss = loss + options.perceptual * metrics["perceptual"]

        playing = options.adversarial > 0 and state.iteration >= options.adversarial_from
        if playing:
            logits = self.discriminator(y)[-1]
            if state.iteration >= options.adversarial_from + options.adversarial_warmup:
                loss = loss + options.adversarial * hinge_generator([logits])
            metrics["fake_logits"] = logits.mean()
        yield "autoencoder", loss, metrics

        if playing:
            real, fake = self.discriminator(x)[-1], self.discriminator(y.detach())[-1]
            hinge = hinge_discriminator([real], [fake])
            yield "discriminator", hinge, {"discriminator": hinge, "real_logits": real.mean()}

    def sheet(self, state: TrainState) -> tuple[NDArray[np.uint8], list[str]]:
        """The first pictures since the run began or was resumed, above what becomes of them."""
        assert self._shown is not None
        averaged = copy_with_weights(self.autoencoder, state.averaged("autoencoder"), self._shown.device)
        with torch.no_grad():
            y = averaged.decode(most_likely_latents(averaged, self._shown)).sample
        return to_uint8(torch.cat([self._shown, y])).cpu().numpy(), self._captions + ["reconstruction"] * len(y)

    def export(self, state: TrainState, folder: Path) -> None:
        """The averaged autoencoder in diffusers' format, its scale 1 until `LatentSpace.calibrate` has seen latents."""
        save_averaged(state, "autoencoder", folder / "vae")


def perceptual(weight: float, file: str) -> LPIPS | None:
    """The distance that a recipe weighs by `weight`; None where that is 0.

    Raises:
        RecipeError: no file is named for its weights. CheckpointError: it does not hold them.
    """
    if weight and not file:
        raise RecipeError("perceptual needs the file of LPIPS's weights: set perceptual_network.")
    return LPIPS.load(file) if weight else None


def window(side: int, width: int, state: TrainState, beyond: float = 0.25) -> tuple[slice, slice]:
    """Rows and columns of a random window of `width` cells in maps of `side` cells; of all where `width` is more.

    It may fall `beyond` the edges by that share of its width and is pushed back, or what lies at an edge would hardly
    ever be seen.
    """
    width = min(width, side)
    over = int(width * beyond)
    starts = (min(max(at, 0), side - width) for at in state.draw.shared(-over, side - width + over, 2))
    rows, columns = (slice(start, start + width) for start in starts)
    return rows, columns


def build(options: Options) -> AutoencoderTiny | AutoencoderKL:
    """The autoencoder that `options` describe, with random weights. Its factor is 2 ** (number of stages - 1).

    Raises:
        RecipeError: sizes that do not fit together.
    """
    if options.kind == "kl":
        if any(width % 8 for width in options.widths):
            raise RecipeError("autoencoder.widths must be multiples of 8: its layers normalise in 8 groups.")
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(options.widths),
            up_block_types=("UpDecoderBlock2D",) * len(options.widths),
            block_out_channels=tuple(options.widths),
            layers_per_block=options.layers_per_block,
            latent_channels=options.latent_channels,
            norm_num_groups=8,
            sample_size=128,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
    stages = len(options.encoder_blocks)
    if stages != len(options.decoder_blocks):
        raise RecipeError("encoder_blocks and decoder_blocks must be as long as each other: one number for each size.")
    autoencoder = AutoencoderTiny(
        latent_channels=options.latent_channels,
        encoder_block_out_channels=(options.encoder_width,) * stages,
        decoder_block_out_channels=(options.decoder_width,) * len(options.decoder_blocks),
        num_encoder_blocks=tuple(options.encoder_blocks),
        num_decoder_blocks=tuple(options.decoder_blocks),
        upsampling_scaling_factor=2,
    )
    keep_variance(autoencoder)
    return autoencoder


def continue_from(folder: str, autoencoder: nn.Module) -> None:
    """Give `autoencoder` the weights of the one in `folder`.

    Raises:
        RecipeError: its sizes are others than the recipe's.
    """
    try:
        autoencoder.load_state_dict(load_autoencoder(folder).state_dict())
    except RuntimeError as error:
        raise RecipeError(
            f"the autoencoder in '{folder}' has other sizes than the recipe: copy its channels, widths and blocks "
            "to [autoencoder]."
        ) from error


@torch.no_grad()
def keep_variance(autoencoder: AutoencoderTiny) -> None:
    """Start every residual block as the identity and every other convolution so that it keeps the variance.

    PyTorch's default shrinks the signal at each of the dozen convolutions between picture and picture, and without
    normalisation layers it takes thousands of steps to grow back.
    """
    for half in (autoencoder.encoder, autoencoder.decoder):
        for layer in half.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight, 2**0.5 if layer.out_channels == layer.in_channels else 1.0)
                if layer.bias is not None:
                    layer.bias.zero_()
            elif hasattr(layer, "conv"):
                layer.conv[-1].weight.zero_()
                layer.conv[-1].bias.zero_()
                for conv in (layer.conv[0], layer.conv[2]):
                    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                    conv.bias.zero_()
