"""Frozen feature networks: what the discriminator's heads look through, one small class each.

A feature network maps a batch to a list of features, tokens [B, N, D] on a square grid (N = side * side), [B, h, w, D]
on another, and to one `embedding` [B, E] of the whole input. Its weights never train and it never leaves eval mode;
gradients flow through it to its input. `widths` says D for each feature.

Shapes: B batch, C channels, H W input size, N tokens, D width, E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel

from onestill.errors import CheckpointError, RecipeError
from onestill.networks.condition import Condition
from onestill.networks.contrastive import ContrastiveModel, tokens


class FeatureNetwork(Protocol):
    widths: tuple[int, ...]
    embedding_width: int

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Any: ...

    def features(self, x: Tensor) -> list[Tensor]: ...

    def embed(self, x: Tensor) -> Tensor: ...


def on_grid(state: Tensor) -> Tensor:
    """A hidden state as tokens [B, N, D]; a map [B, D, h, w] that is not square as [B, h, w, D]."""
    return tokens(state) if state.ndim < 4 or state.shape[2] == state.shape[3] else state.permute(0, 2, 3, 1)


def tower_widths(config: Any, layers: Sequence[int], folder: str | Path) -> tuple[int, ...]:
    """D of each feature of a tower with this config. Raises CheckpointError for one that the tower does not have."""
    widths = getattr(config, "hidden_sizes", None)
    stages = [config.embedding_size, *widths] if widths else [config.hidden_size] * (config.num_hidden_layers + 1)
    if any(not 0 <= layer < len(stages) for layer in layers):
        raise CheckpointError(f"{folder} has layers 0 to {len(stages) - 1}, not {list(layers)}: change 'tower_layers'.")
    return tuple(stages[layer] for layer in layers)


class TowerFeatures:
    """Our own contrastive image tower as a feature network; features after the blocks that `layers` names.

    `space` and `channels` say what it was trained to see: "pixels" or "latents", of so many channels.
    """

    def __init__(self, folder: Path, layers: tuple[int, ...]) -> None:
        self.tower = ContrastiveModel.load(folder)
        config: Any = self.tower.backbone.config
        self.layers, self.widths = layers, tower_widths(config, layers, folder)
        self.space = self.tower.space
        self.channels = int(config.num_channels)
        self.embedding_width = self.tower.image_projection.out_features

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TowerFeatures:
        self.tower.to(device, dtype=dtype)
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        config: Any = self.tower.backbone.config
        if config.model_type == "vit" and x.shape[2:] != (config.image_size,) * 2:
            raise RecipeError(
                f"the tower sees squares of {config.image_size} and is shown {x.shape[2]} x {x.shape[3]}: cut such "
                "windows with discriminator_input.crop, or choose another features.network."
            )
        states = self.tower.backbone(pixel_values=self._cast(x), output_hidden_states=True).hidden_states
        return [on_grid(states[layer]).float() for layer in self.layers]

    def embed(self, x: Tensor) -> Tensor:
        return self.tower.embed_image(self._cast(x)).float()

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.tower.logit_scale.dtype)


class ViTFeatures:
    """A frozen vision transformer that `transformers` knows (DINOv2, ViT, CLIP's image side), on pictures.

    Args:
        folder: config, weights, and the picture's mean and deviation if `preprocessor_config.json` tells them; else
            ImageNet's.
        layers: features after these blocks, 0 for the embedding.
        size: pixels of a side that it is shown, a multiple of its patch; pictures are resized to it.
        add_class_token: whether each patch's feature has the class token added, as StyleGAN-T does.
    """

    def __init__(self, folder: Path, layers: tuple[int, ...], size: int, *, add_class_token: bool = True) -> None:
        self.model, config = _open_vit(folder)
        if any(not 0 <= layer <= config.num_hidden_layers for layer in layers):
            raise CheckpointError(
                f"{folder} has layers 0 to {config.num_hidden_layers}, not {list(layers)}: change 'vit_layers'."
            )
        if size % config.patch_size:
            raise CheckpointError(f"{folder} cuts patches of {config.patch_size} px: 'vit_size' {size} is no multiple.")
        self.layers, self.size, self._add_class_token = layers, size, add_class_token
        self.widths = (config.hidden_size,) * len(layers)
        self.embedding_width = config.hidden_size
        self._kwargs = {} if config.image_size == size else {"interpolate_pos_encoding": True}
        if config.model_type == "dinov2":
            self._kwargs = {}  # it interpolates by itself
        self._mean, self._deviation = _normalisation(folder)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> ViTFeatures:
        self.model.to(device, dtype=dtype)
        self._mean, self._deviation = self._mean.to(device), self._deviation.to(device)
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        """Pictures [B, 3, H, W] in about [-1, 1] -> tokens [B, N, D] for each layer."""
        states = self._run(x).hidden_states
        return [self._feature(states[layer].float()) for layer in self.layers]

    def embed(self, x: Tensor) -> Tensor:
        """The class token after the last norm, [B, D]."""
        output = self._run(x)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        return (output.last_hidden_state[:, 0] if pooled is None else pooled).float()

    def _feature(self, state: Tensor) -> Tensor:
        return tokens(state) + state[:, :1] if self._add_class_token else tokens(state)

    def _run(self, x: Tensor) -> Any:
        if x.shape[2:] != (self.size, self.size):
            # "area" is the mean over what becomes one pixel; enlarging needs something smoother.
            smaller = min(x.shape[2:]) >= self.size
            x = F.interpolate(x, (self.size, self.size), mode="area" if smaller else "bilinear")
        pixels = ((x + 1) / 2 - self._mean) / self._deviation
        dtype = next(self.model.parameters()).dtype
        return self.model(pixel_values=pixels.to(dtype), output_hidden_states=True, **self._kwargs)


def _open_vit(folder: Path) -> tuple[Any, Any]:
    """The model and its config; of a CLIP, the image side."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        bare = {"add_pooling_layer": False} if kind == "vit" else {}
        model: Any = AutoModel.from_pretrained(folder, local_files_only=True, **bare)
        model = getattr(model, "vision_model", model)
        shape = [model.config.num_hidden_layers, model.config.patch_size, model.config.hidden_size]
        assert all(isinstance(number, int) for number in shape)
    except (OSError, KeyError, AttributeError, AssertionError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no vision transformer ({error}): give the folder of a DINOv2, ViT or CLIP in "
            "transformers' format."
        ) from error
    return model.eval().requires_grad_(False), model.config


def _normalisation(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation [1, 3, 1, 1] of pixels in [0, 1]."""
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    mean, deviation = config.get("image_mean", [0.485, 0.456, 0.406]), config.get("image_std", [0.229, 0.224, 0.225])
    return torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(deviation).view(1, 3, 1, 1)


class LatentFeatures:
    """Nothing between the heads and the latents: the one feature is the latents, with edges as sharp as theirs."""

    def __init__(self, channels: int) -> None:
        self.widths: tuple[int, ...] = (channels,)
        self.embedding_width = channels

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LatentFeatures:
        return self  # there are no weights

    def features(self, x: Tensor) -> list[Tensor]:
        return [on_grid(x)]

    def embed(self, x: Tensor) -> Tensor:
        return tokens(x).mean(1)


class TeacherFeatures:
    """The teacher's own encoder on re-noised latents: each down block before it halves the grid, and the middle block.

    Args:
        denoiser: the frozen teacher with its schedule.
    """

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        widths = denoiser.unet.config["block_out_channels"]
        self.widths = (*widths, widths[-1])
        self.embedding_width = widths[-1]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> TeacherFeatures:
        return self  # the teacher is moved by who owns it

    def features(self, x: Tensor) -> list[Tensor]:
        """Latents as they are, with the empty condition: zeros."""
        config = self.denoiser.unet.config
        text, mask = x.new_zeros(len(x), 1, config["cross_attention_dim"]), x.new_ones(len(x), 1).bool()
        blank = Condition(text, mask)
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            blank = Condition(text, mask, x.new_zeros(len(x), pooled), x.new_zeros(len(x), 6))
        return self.encode(x, torch.zeros(len(x), dtype=torch.long, device=x.device), blank)

    def noised_features(self, latents: Tensor, timesteps: Tensor, noise: Tensor, condition: Condition) -> list[Tensor]:
        """Features of latents [B, C, h, w] noised to timesteps [B], under the teacher's conditioning."""
        alpha, sigma = self.denoiser.signal(timesteps)
        return self.encode(alpha * latents + sigma * noise, timesteps, condition)

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x)[-1].flatten(1, -2).mean(1)

    def encode(self, x: Tensor, timesteps: Tensor, condition: Condition) -> list[Tensor]:
        """Features of x [B, C, h, w] as it is, taken to be noised to timesteps [B]."""
        unet = self.denoiser.unet
        condition, x = condition.cast(unet.dtype), x.to(unet.dtype)
        emb = unet.time_embedding(unet.get_time_embed(x, timesteps))
        added = unet.get_aug_embed(emb, condition.text, condition.added.get("added_cond_kwargs", {}))
        emb = emb if added is None else emb + added
        hidden, features = unet.conv_in(x), []
        for block in unet.down_blocks:
            text = {"encoder_hidden_states": condition.text} if getattr(block, "has_cross_attention", False) else {}
            hidden, states = block(hidden_states=hidden, temb=emb, **text)
            # The last state of a block that halves the grid is the halved one; the one before is as fine as its input.
            features.append(on_grid(states[-1 if block.downsamplers is None else -2]).float())
        features.append(on_grid(unet.mid_block(hidden, emb, encoder_hidden_states=condition.text)).float())
        return features
