"""What the heads see: feature networks on latents, on decoded pictures or on noised latents, under one random view.

A view is drawn once an iteration and used on the real samples and on the student's, so that nothing but the student
tells them apart.

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
class ViewOptions:
    """What the heads look through, at what, and how it is changed at random.

    `feature_network`: `tower` is our contrastive image tower, `vit` any vision transformer of transformers (DINOv2),
    `cnn` a convolutional network at its named `cnn_stages` (EfficientNet-lite0), `teacher` the teacher's own features
    on noised latents, `both` is tower and teacher, `cnn+teacher` says itself. `latents_too` gives one more head the
    latents themselves, which no network has made coarser. `adversarial_space` is what towers see: "latents", or
    "pixels" decoded from them with gradient; a ViT or CNN always sees pixels, the latter made `cnn_size` px large (0:
    as they are). `crop` decodes a window of so many latents a side, at random (0: all). `feature_low` and
    `feature_high` bound the noise under the teacher's features. `shift` rolls by up to so many places, `augment` lists
    DiffAugment's parts, `vit_crop` is how often a ViT is shown a window of its own size instead of all, made smaller.
    """

    feature_network: str = option("tower", choices=("tower", "teacher", "both", "vit", "cnn", "cnn+teacher"))
    latents_too: bool = option(False)
    tower: str = option("runs/tower/export")
    tower_layers: list[int] = option([2, 4, 6], low=0)
    vit: str = option("")
    vit_layers: list[int] = option([0, 3, 6, 9, 12], low=0)
    vit_size: int = option(224, low=8, high=2048)
    vit_crop: float = option(0.5, low=0.0, high=1.0)
    cnn: str = option("")
    cnn_stages: list[str] = option(["stages.1", "stages.2", "stages.4", "stages.6"])
    cnn_size: int = option(0, low=0, high=2048)
    image_encoder: str = option("")
    image_encoder_size: int = option(224, low=8, high=2048)
    adversarial_space: str = option("latents", choices=("latents", "pixels"))
    crop: int = option(0, low=0, high=1024)
    feature_low: int = option(0, low=0, high=999)
    feature_high: int = option(499, low=0, high=999)
    shift: int = option(1, low=0)
    augment: list[str] = option([])


class Views:
    """The feature networks of a recipe and the space in which they look.

    Args:
        levels: draws the noise levels under the teacher's features: (count, draw) -> timesteps [B]; uniform from
            `feature_low` to `feature_high`, unless told.

    Raises:
        RecipeError: options that contradict each other.
        CheckpointError: a network is not there.
    """

    def __init__(
        self,
        options: ViewOptions,
        teacher: Denoiser,
        space: LatentSpace,
        levels: Callable[[int, Draw], Tensor] | None = None,
    ) -> None:
        _check(options)
        self.options, self.space = options, space
        self.networks: list[FeatureNetwork] = []
        if options.feature_network in ("tower", "both"):
            tower = TowerFeatures(Path(options.tower), tuple(options.tower_layers))
            _check_tower(tower, options, space)
            self.networks.append(tower)
        if options.feature_network == "vit":
            self.networks.append(ViTFeatures(Path(options.vit), tuple(options.vit_layers), options.vit_size))
        if options.feature_network in THROUGH_CNN:
            self.networks.append(CNNFeatures(options.cnn, options.cnn_stages, options.cnn_size))
        if options.feature_network in NOISED:
            self.networks.append(TeacherFeatures(teacher))
        self.image_encoder: FeatureNetwork = self.networks[0]
        if options.latents_too:
            self.networks.append(LatentFeatures(space.channels))
        if options.image_encoder:
            self.image_encoder = ViTFeatures(Path(options.image_encoder), (), options.image_encoder_size)
        self._levels = levels or (lambda count, draw: draw.integers(options.feature_low, options.feature_high, count))

    @property
    def widths(self) -> list[int]:
        """D of each tap."""
        return [width for network in self.networks for width in network.widths]

    @property
    def in_pixels(self) -> bool:
        """Whether latents are decoded for the networks that see no noise."""
        return self.options.adversarial_space == "pixels" or self.options.feature_network in IN_PIXELS

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
                network.taps = compiled(network.taps, loop, device)  # type: ignore[method-assign]

    def draw(self, latents: Tensor, draw: Draw) -> View:
        """The view of one iteration, for latents like these [B, C, h, w]."""
        return View(self, latents, draw)

    @torch.no_grad()
    def embed(self, latents: Tensor) -> Tensor:
        """c_img: one embedding of each whole picture [B, E], not changed at random."""
        decoded = isinstance(self.image_encoder, ViTFeatures | CNNFeatures) or (
            self.in_pixels and not isinstance(self.image_encoder, TeacherFeatures)
        )
        return self.image_encoder.embed(self.space.decode(latents) if decoded else latents)


class View:
    """One draw of crop, shift, augmentation, noise level and noise; called on real and on made latents alike.

    `at` holds the noise levels [B] under the teacher's features.
    """

    def __init__(self, views: Views, latents: Tensor, draw: Draw) -> None:
        options, count, device = views.options, len(latents), latents.device
        self._views = views
        self._shift = draw.shared(-options.shift, options.shift, 2)
        self.at = views._levels(count, draw).to(device)
        self._noise = draw.normal(*latents.shape).to(device)
        side = min(options.crop, latents.shape[-1]) if options.crop else latents.shape[-1]
        self._window = (0, 0, side)
        if side < latents.shape[-1]:
            row, column = (draw.shared(0, room - side, 1)[0] for room in latents.shape[2:])
            self._window = (row, column, side)
        seen = side * (views.space.factor if views.in_pixels else 1)
        self._augment = Augmentation(options.augment, count, (seen, seen), draw, device) if options.augment else None
        self._decoded: dict[int, tuple[Tensor, Tensor]] = {}
        self._corner: tuple[int, int] | None = None
        if options.feature_network == "vit" and seen > options.vit_size and options.vit_crop:
            chance, row, column = draw.shared(0, 9999, 3)
            if chance < options.vit_crop * 10000:
                room = seen - options.vit_size + 1
                self._corner = (row % room, column % room)

    def __call__(self, latents: Tensor, condition: Condition) -> list[Tensor]:
        """Latents [B, C, h, w] -> every network's taps [B, N_k, D_k]."""
        taps: list[Tensor] = []
        for network in self._views.networks:
            if isinstance(network, TeacherFeatures):
                taps += network.noised_taps(latents, self.at, self._noise, condition)
            elif isinstance(network, LatentFeatures):
                taps += network.taps(torch.roll(self._cut(latents), self._shift, (2, 3)))
            else:
                taps += network.taps(self._seen(latents))
        return taps

    def pixels(self, latents: Tensor) -> Tensor:
        """The view's window of latents [B, C, h, w], decoded to [B, 3, H, W]; the same latents are decoded once."""
        if id(latents) not in self._decoded:
            self._decoded[id(latents)] = latents, self._views.space.decode(self._cut(latents))
        return self._decoded[id(latents)][1]

    def _cut(self, latents: Tensor) -> Tensor:
        row, column, side = self._window
        return latents[:, :, row : row + side, column : column + side]

    def _seen(self, latents: Tensor) -> Tensor:
        """What a network without noise is shown: latents, or pictures [B, 3, H, W] in about [-1, 1]."""
        x = self.pixels(latents) if self._views.in_pixels else self._cut(latents)
        x = torch.roll(x, self._shift, (2, 3))
        if self._augment is not None:
            x = self._augment(x)
        if self._corner is not None:
            (down, right), size = self._corner, self._views.options.vit_size
            x = x[:, :, down : down + size, right : right + size]
        return x


def _check_tower(tower: TowerFeatures, options: ViewOptions, space: LatentSpace) -> None:
    shown, channels = options.adversarial_space, 3 if options.adversarial_space == "pixels" else space.channels
    if (tower.space, tower.channels) != (shown, channels):
        raise RecipeError(
            f"the tower {options.tower} was trained on {tower.space} of {tower.channels} channels, and "
            f"adversarial_space shows it {shown} of {channels}: give another tower, or change adversarial_space."
        )


def _check(options: ViewOptions) -> None:
    if options.feature_low > options.feature_high:
        raise RecipeError("feature_low must not be above feature_high.")
    if getattr(options, "shard_teacher", False) and options.feature_network in NOISED:
        raise RecipeError("shard_teacher needs features that are not the teacher's own, which are read block by block.")
    if options.feature_network == "vit" and not options.vit:
        raise RecipeError("feature_network is 'vit': name its folder with vit = \"path/to/dinov2-small\".")
    if options.feature_network in THROUGH_CNN and not options.cnn:
        raise RecipeError('feature_network sees through a CNN: name its folder with cnn = "path/to/network".')
    for kind in options.augment:
        if kind not in KINDS:
            raise RecipeError(f"augment may list {', '.join(KINDS)}, not {kind!r}.")
    if (
        "colour" in options.augment
        and options.adversarial_space == "latents"
        and options.feature_network not in IN_PIXELS
    ):
        raise RecipeError("augment cannot change the colour of latents: leave it out, or decode them to pixels.")
