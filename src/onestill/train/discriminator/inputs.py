"""What the heads see: feature networks on latents, on decoded pictures or on noised latents, under a random transform.

A transform is drawn once an iteration and applied to the real samples and to the student's, so that nothing but the
student distinguishes them.

Shapes: B batch, C latent channels, h w latent size, H W pixels, N tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onestill.errors import RecipeError
from onestill.networks.condition import Condition
from onestill.networks.denoiser import Denoiser
from onestill.networks.latents import LatentSpace
from onestill.train.discriminator.augment import KINDS, Augmentation
from onestill.train.discriminator.cnn import CNNFeatures
from onestill.train.discriminator.features import (
    FeatureNetwork,
    LatentFeatures,
    TeacherFeatures,
    TowerFeatures,
    ViTFeatures,
)
from onestill.train.noise import Draw
from onestill.train.recipe import LoopOptions, option
from onestill.train.runtime.compiling import compiled

# Which kinds of feature network hold a CNN, see decoded pictures whatever the space, and see noised latents.
THROUGH_CNN = ("cnn", "cnn+teacher")
IN_PIXELS = ("vit", *THROUGH_CNN)
NOISED = ("teacher", "both", "cnn+teacher")


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What the heads look through: the frozen network F of section 3.2, and the one that embeds the real image."""

    # vit is the paper's (DINOv2), cnn Projected GAN's, teacher LADD's; tower is our contrastive one, both adds teacher
    network: str = option(
        "tower", choices=("tower", "teacher", "both", "vit", "cnn", "cnn+teacher"), was="feature_network"
    )
    # one more head on the latents themselves, where edges are sharpest; measured on icons (recipes/icons/LOG.md)
    latents_too: bool = option(False)
    tower: str = option("runs/tower/export")  # a `contrastive` run's export
    tower_layers: list[int] = option([2, 4, 6], low=0)  # spread over its depth, StyleGAN-T's way
    vit: str = option("")  # a folder in transformers' format
    # the embedding and every third of ViT-S's 12 blocks: five heads, as in StyleGAN-T; which is not stated
    vit_layers: list[int] = option([0, 3, 6, 9, 12], low=0)
    vit_size: int = option(224, low=8, high=2048)  # px of a side that it is shown; not stated
    # how often a window of that size is cut out of a larger picture, which is made smaller else; StyleGAN-T's half
    vit_crop: float = option(0.5, low=0.0, high=1.0)
    cnn: str = option("")  # a folder: EfficientNet-lite0's, or in transformers' format
    # a quarter to a 32nd of the side, Projected GAN's choice; names differ in other networks
    cnn_stages: list[str] = option(["stages.1", "stages.2", "stages.4", "stages.6"])
    cnn_size: int = option(0, low=0, high=2048)  # px of a side that it is shown; 0: as pictures are
    # whose embedding is c_img: DINOv2 ViT-L's class token in the paper; "" is the feature network's own
    image_encoder: str = option("")
    image_encoder_size: int = option(224, low=8, high=2048)  # px of a side; DINOv2's own


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """At what the feature networks look, and how it is changed at random, alike for real and made samples."""

    # what towers see; the paper decodes to pixels, which costs a decoder with gradient. A ViT or CNN always sees pixels
    space: str = option("latents", choices=("latents", "pixels"), was="adversarial_space")
    crop: int = option(0, low=0, high=1024)  # latents a side of a random window that is decoded; 0: all
    shift: int = option(1, low=0)  # largest random roll: DiffAugment's translation, for latents too
    augment: list[str] = option([])  # parts of DiffAugment; StyleGAN-T has all, ADD's are not stated
    # t of the noise under the teacher's features, uniform between these: low judges texture, high structure (LADD)
    t_low: int = option(0, low=0, high=999, was="feature_low")
    t_high: int = option(499, low=0, high=999, was="feature_high")  # AMD goes to 750, DMD2 to 999


class DiscriminatorInputs:
    """The feature networks of a recipe and the space in which they look.

    Args:
        levels: draws the noise under the teacher's features: (count, draw) -> timesteps [B]. The default is uniform
            from `t_low` to `t_high`.

    Raises:
        RecipeError: options that contradict each other.
        CheckpointError: a network is not there.
    """

    def __init__(
        self,
        features: FeatureOptions,
        options: InputOptions,
        teacher: Denoiser,
        space: LatentSpace,
        levels: Callable[[int, Draw], Tensor] | None = None,
    ) -> None:
        _check(features, options)
        self.feature_options, self.options, self.space = features, options, space
        self.networks: list[FeatureNetwork] = []
        if features.network in ("tower", "both"):
            tower = TowerFeatures(Path(features.tower), tuple(features.tower_layers))
            _check_tower(tower, features, options, space)
            self.networks.append(tower)
        if features.network == "vit":
            self.networks.append(ViTFeatures(Path(features.vit), tuple(features.vit_layers), features.vit_size))
        if features.network in THROUGH_CNN:
            self.networks.append(CNNFeatures(features.cnn, features.cnn_stages, features.cnn_size))
        if features.network in NOISED:
            self.networks.append(TeacherFeatures(teacher))
        self.image_encoder: FeatureNetwork = self.networks[0]
        if features.latents_too:
            self.networks.append(LatentFeatures(space.channels))
        if features.image_encoder:
            self.image_encoder = ViTFeatures(Path(features.image_encoder), (), features.image_encoder_size)
        self.levels = levels or (lambda count, draw: draw.integers(options.t_low, options.t_high, count))

    @property
    def widths(self) -> list[int]:
        """D of each feature."""
        return [width for network in self.networks for width in network.widths]

    @property
    def in_pixels(self) -> bool:
        """Whether latents are decoded for the networks that see no noise."""
        return self.options.space == "pixels" or self.feature_options.network in IN_PIXELS

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        for network in {id(n): n for n in (*self.networks, self.image_encoder)}.values():
            network.to(device, dtype)

    def compile(self, loop: LoopOptions, device: torch.device) -> None:
        """Compile the networks, where `loop.compile` asks for it."""
        for network in self.networks:
            if isinstance(network, TeacherFeatures):  # which runs parts of the teacher, and not the compiled whole
                network.denoiser = network.denoiser.eager
                network.encode = compiled(network.encode, loop, device)  # type: ignore[method-assign]
            elif not isinstance(network, LatentFeatures):
                network.features = compiled(network.features, loop, device)  # type: ignore[method-assign]

    def draw(self, latents: Tensor, draw: Draw) -> InputTransform:
        """The transform of one iteration, for latents like these [B, C, h, w]."""
        return InputTransform(self, latents, draw)

    @torch.no_grad()
    def embed(self, latents: Tensor) -> Tensor:
        """c_img: one embedding of each whole picture [B, E], not changed at random."""
        decoded = isinstance(self.image_encoder, ViTFeatures | CNNFeatures) or (
            self.in_pixels and not isinstance(self.image_encoder, TeacherFeatures)
        )
        return self.image_encoder.embed(self.space.decode(latents) if decoded else latents)


class InputTransform:
    """One draw of crop, shift, augmentation, noise level and noise, applied to real and to made latents alike.

    Attributes:
        timesteps: the noise levels [B] under the teacher's features.
    """

    def __init__(self, inputs: DiscriminatorInputs, latents: Tensor, draw: Draw) -> None:
        features, options = inputs.feature_options, inputs.options
        count, device = len(latents), latents.device
        self._inputs = inputs
        self._shift = draw.shared(-options.shift, options.shift, 2)
        self.timesteps = inputs.levels(count, draw).to(device)
        self._noise = draw.normal(*latents.shape).to(device)
        sides = tuple(min(options.crop or side, side) for side in latents.shape[2:])
        self._window = (0, 0, *sides)
        if sides != tuple(latents.shape[2:]):
            corner = [draw.shared(0, room - side, 1)[0] for room, side in zip(latents.shape[2:], sides, strict=True)]
            self._window = (*corner, *sides)
        factor = inputs.space.factor if inputs.in_pixels else 1
        seen = (sides[0] * factor, sides[1] * factor)
        self._augment = Augmentation(options.augment, count, seen, draw, device) if options.augment else None
        self._decoded: dict[int, tuple[Tensor, Tensor]] = {}
        self._corner: tuple[int, int] | None = None
        if features.network == "vit" and min(seen) >= features.vit_size < max(seen) and features.vit_crop:
            chance, row, column = draw.shared(0, 9999, 3)
            if chance < features.vit_crop * 10000:
                height, width = seen
                self._corner = (row % (height - features.vit_size + 1), column % (width - features.vit_size + 1))

    def features(self, latents: Tensor, conditioning: Condition) -> list[Tensor]:
        """Latents [B, C, h, w] -> every network's features [B, N_k, D_k]."""
        found: list[Tensor] = []
        for network in self._inputs.networks:
            if isinstance(network, TeacherFeatures):
                found += network.noised_features(latents, self.timesteps, self._noise, conditioning)
            elif isinstance(network, LatentFeatures):
                found += network.features(torch.roll(self._cut(latents), self._shift, (2, 3)))
            else:
                found += network.features(self._seen(latents))
        return found

    def pixels(self, latents: Tensor) -> Tensor:
        """The window of latents [B, C, h, w], decoded to [B, 3, H, W]; the same latents are decoded once."""
        if id(latents) not in self._decoded:
            self._decoded[id(latents)] = latents, self._inputs.space.decode(self._cut(latents))
        return self._decoded[id(latents)][1]

    def _cut(self, latents: Tensor) -> Tensor:
        row, column, height, width = self._window
        return latents[:, :, row : row + height, column : column + width]

    def _seen(self, latents: Tensor) -> Tensor:
        """What a network without noise is shown: latents, or pictures [B, 3, H, W] in about [-1, 1]."""
        x = self.pixels(latents) if self._inputs.in_pixels else self._cut(latents)
        x = torch.roll(x, self._shift, (2, 3))
        if self._augment is not None:
            x = self._augment(x)
        if self._corner is not None:
            (down, right), size = self._corner, self._inputs.feature_options.vit_size
            x = x[:, :, down : down + size, right : right + size]
        return x


def _check_tower(tower: TowerFeatures, features: FeatureOptions, options: InputOptions, space: LatentSpace) -> None:
    channels = 3 if options.space == "pixels" else space.channels
    if (tower.space, tower.channels) != (options.space, channels):
        raise RecipeError(
            f"the tower {features.tower} was trained on {tower.space} of {tower.channels} channels, and "
            f"discriminator_input.space shows it {options.space} of {channels}: give another tower, or change space."
        )


def _check(features: FeatureOptions, options: InputOptions) -> None:
    """Raise RecipeError for options that contradict each other."""
    if options.t_low > options.t_high:
        raise RecipeError("discriminator_input.t_low must not be above its t_high.")
    if features.network == "vit" and not features.vit:
        raise RecipeError('features.network is "vit": name its folder with features.vit = "path/to/dinov2-small".')
    if features.network in THROUGH_CNN and not features.cnn:
        raise RecipeError('features.network sees through a CNN: name its folder with features.cnn = "path/to/network".')
    for kind in options.augment:
        if kind not in KINDS:
            raise RecipeError(f"discriminator_input.augment may list {', '.join(KINDS)}, not {kind!r}.")
    if "colour" in options.augment and options.space == "latents" and features.network not in IN_PIXELS:
        raise RecipeError(
            "discriminator_input.augment cannot change the colour of latents: leave it out, or decode them to pixels."
        )
