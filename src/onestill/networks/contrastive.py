"""A contrastive model: an image tower that shares a space with text. `[torch]`

The discriminator looks through it, the Fréchet distance is measured in its features, and the two sides of the shared
space give a CLIP score. Its folder holds `contrastive.json`, `image_tower/` (a vision model of transformers) and
`projections.safetensors` (`image_projection.weight` [E, F], `text_projection.weight` [E, D], `logit_scale`). The text
side is a frozen sentence encoder that lies elsewhere.

Shapes: B batch, C channels, H W input size, N tokens, F width of the image tower, K text tokens, D text width,
E embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from onestill.errors import CheckpointError, first_line
from onestill.networks.condition import pool
from onestill.networks.libraries import open_whole

__all__ = ["ContrastiveModel", "new_backbone", "tokens"]


class ContrastiveModel(nn.Module):
    """An image tower and two projections into the space that images share with text.

    Args:
        backbone: any `transformers` vision model with `output_hidden_states` (ViT, ResNet, DINOv2...).
        embedding_width: E of the shared space.
        text_width: width of the text encoder's states.
        facts: what `contrastive.json` says of it; `space` is "pixels" or "latents", what it was trained to see.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embedding_width: int,
        text_width: int = 384,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.facts = dict(facts or {})
        config: Any = backbone.config
        hidden = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size
        self.backbone = backbone
        self.image_projection = nn.Linear(hidden, embedding_width, bias=False)
        self.text_projection = nn.Linear(text_width, embedding_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # log of an inverse temperature of about 14

    @property
    def space(self) -> str:
        """What the image tower was trained to see: "pixels" or "latents"."""
        return str(self.facts.get("space", "pixels"))

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """Input [B, C, H, W] -> the image tower's hidden states as tokens, [B, N, F_k] each."""
        output = self.backbone(pixel_values=x, output_hidden_states=True)
        return [tokens(state) for state in output.hidden_states]

    def features(self, x: Tensor) -> Tensor:
        """Input [B, C, H, W] -> the mean of the image tower's last tokens [B, F]."""
        return tokens(self.backbone(pixel_values=x).last_hidden_state).mean(1)

    def embed_image(self, x: Tensor) -> Tensor:
        """Input [B, C, H, W] -> unit embeddings [B, E]."""
        return F.normalize(self.image_projection(self.features(x)), dim=-1)

    def embed_text(self, text: Tensor, mask: Tensor) -> Tensor:
        """Token states [B, K, D] and their mask [B, K] -> unit embeddings [B, E]."""
        return F.normalize(self.text_projection(pool(text, mask)), dim=-1)

    def save(self, folder: Path) -> None:
        """Write the backbone in transformers' format, the projections, and `contrastive.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder / "image_tower")  # type: ignore[operator]
        heads = {
            "image_projection.weight": self.image_projection.weight,
            "text_projection.weight": self.text_projection.weight,
            "logit_scale": self.logit_scale,
        }
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in heads.items()}, folder / "projections.safetensors"
        )
        widths = {"embedding_dim": self.image_projection.out_features, "text_width": self.text_projection.in_features}
        (folder / "contrastive.json").write_text(
            json.dumps({**self.facts, **widths}, indent=1) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> ContrastiveModel:
        """What `save` wrote, frozen, in float32.

        Raises:
            CheckpointError: the folder holds something else, or a file is damaged.
        """
        try:
            facts = json.loads((folder / "contrastive.json").read_text(encoding="utf-8"))
            kind = json.loads((folder / "image_tower" / "config.json").read_text(encoding="utf-8"))["model_type"]
            # A ViT would otherwise be given a pooler with random weights, which nothing here uses.
            bare = {"add_pooling_layer": False} if kind == "vit" else {}
            options = {"use_safetensors": True, "dtype": torch.float32}
            backbone = open_whole(AutoModel, folder / "image_tower", **options, **bare)
            heads = load_file(folder / "projections.safetensors")
            image, text = (heads[f"{side}_projection.weight"] for side in ("image", "text"))
            model = cls(backbone, len(image), text.shape[1], facts)
            weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
            model.load_state_dict({**model.state_dict(), **heads, **weights})
        except Exception as error:  # of files that are damaged the libraries raise anything
            raise CheckpointError(
                f"{folder} holds no contrastive model, or one that cannot be opened ({first_line(error)}): copy it "
                "again, or train one with a 'contrastive' recipe."
            ) from error
        return model.eval().requires_grad_(False)


def new_backbone(kind: str, *, channels: int, size: int, patch: int, width: int, depth: int) -> nn.Module:
    """A small vision model with random weights: "vit", or "resnet" whose last of four stages is `width` wide."""
    if kind == "vit":
        heads = max(1, width // 64)
        shape = dict(num_channels=channels, image_size=size, patch_size=patch, intermediate_size=4 * width)
        shape |= dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads)
        config = AutoConfig.for_model("vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape)
        return AutoModel.from_config(config, add_pooling_layer=False)  # type: ignore[no-any-return]
    sizes = [width // 8, width // 4, width // 2, width]
    depths = [1, depth, depth, depth]
    config = AutoConfig.for_model(
        "resnet",
        layer_type="basic",
        num_channels=channels,
        embedding_size=width // 8,
        hidden_sizes=sizes,
        depths=depths,
    )
    return AutoModel.from_config(config)  # type: ignore[no-any-return]


def tokens(state: Tensor) -> Tensor:
    """A hidden state as tokens on a square grid [B, N, D]: maps are flattened, a class token is dropped."""
    if state.ndim == 4:
        return state.flatten(2).transpose(1, 2)
    side = int(state.shape[1] ** 0.5)
    return state[:, state.shape[1] - side * side :]
