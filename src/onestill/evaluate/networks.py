"""A contrastive model's folder as the plain callables that an evaluation takes. Needs torch and transformers.

The folder holds `contrastive.json`, `image_tower/` (a transformers vision model) and `projections.safetensors`
(`image_projection.weight` [D, F], `text_projection.weight` [D, E]). Its text side is a frozen sentence encoder that
lies in a model's folder, `tokenizer/` and `text_encoder/`.

Shapes: B batch, H W pixels, N tokens, F width of the image tower, K text tokens, E text width, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from onestill.checkpoint import describe, resolve
from onestill.engine.device import choose
from onestill.errors import CheckpointError, require
from onestill.evaluate.protocol import Network, Pictures
from onestill.text.tokenize import PromptTokenizer

if TYPE_CHECKING:
    import torch

__all__ = ["load_network"]

Float = NDArray[np.float32]


def load_network(
    folder: str | os.PathLike[str],
    text_model: str | os.PathLike[str],
    *,
    name: str | None = None,
    device: str | None = "cpu",
    batch_size: int = 64,
) -> Network:
    """Open a contrastive model for an evaluation; torch loads on its first use.

    Its `features` are the image tower's mean-pooled last tokens (a class token left out), [B, F], before the
    projection: what the Fréchet distance is measured in. `project` is the linear map from there to the space shared
    with text. `texts` are the encoder's last states, averaged where the mask is 1, and projected.

    Args:
        folder: the contrastive model.
        text_model: a model's name or folder whose text encoder the contrastive model was trained with.
        name: how reports call it; default: the folder's name.
        device: where torch computes; None and "auto" are a GPU where it has one.
        batch_size: pictures or captions a call of a network.

    Raises:
        CheckpointError: the folder is something else, or was trained on latents.
        OnestillError: the device cannot be had; the sentence says why.
        MissingExtraError: torch or transformers is not installed.
    """
    for package in ("torch", "transformers"):
        require(package, "torch")
    path = Path(folder)
    facts, image_projection, text_projection = _read(path)
    where = choose(device)
    tower = _ImageTower(path / "image_tower", int(facts["image_size"]), where, batch_size)
    sentences = _Sentences(resolve(text_model), text_projection, where, batch_size)

    def project(features: NDArray[Any]) -> Float:
        return np.asarray(features @ image_projection.T, np.float32)

    return Network(name or path.name, tower, sentences, project, _fingerprint(path))


def _read(folder: Path) -> tuple[dict[str, Any], Float, Float]:
    """contrastive.json, the image projection [D, F] and the text projection [D, E]."""
    try:
        facts: dict[str, Any] = json.loads((folder / "contrastive.json").read_text(encoding="utf-8"))
        space = facts.get("space", "pixels")
        heads = load_file(folder / "projections.safetensors")
        image, text = (heads[f"{side}_projection.weight"].astype(np.float32) for side in ("image", "text"))
        int(facts["image_size"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"'{folder}' holds no contrastive model ({error}); train one with a 'contrastive' recipe"
        ) from error
    if space != "pixels":
        raise CheckpointError(f"'{folder}' was trained on {space} and cannot see pictures; use one trained on pixels")
    return facts, image, text


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([folder / "projections.safetensors", *(folder / "image_tower").glob("*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class _ImageTower:
    """uint8 pictures [B, H, W, 3] -> pooled features [B, F]."""

    def __init__(self, folder: Path, size_px: int, device: str, batch_size: int) -> None:
        self.folder, self.size_px, self.device, self.batch_size = folder, size_px, device, batch_size
        self._model: Any = None

    def __call__(self, pictures: Pictures) -> Float:
        import torch

        if self._model is None:
            self._model = _load(self.folder, self.device)
        parts = [np.zeros((0, 1), np.float32)] if len(pictures) == 0 else []
        for i in range(0, len(pictures), self.batch_size):
            with torch.inference_mode():
                parts.append(self._pooled(torch.from_numpy(pictures[i : i + self.batch_size])).cpu().numpy())
        return np.concatenate(parts)

    def _pooled(self, pictures: torch.Tensor) -> torch.Tensor:
        import torch

        image = pictures.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, 3, H, W] in [-1, 1]
        if image.shape[-2:] != (self.size_px, self.size_px):
            size = (self.size_px, self.size_px)
            image = torch.nn.functional.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        state: torch.Tensor = self._model(pixel_values=image).last_hidden_state
        if state.ndim == 4:
            return state.mean((2, 3))  # a map [B, F, h, w]
        side = int(state.shape[1] ** 0.5)
        return state[:, state.shape[1] - side * side :].mean(1)  # tokens [B, N, F]; class tokens come first


class _Sentences:
    """Captions -> projected sentence embeddings [B, D]. Equal captions are encoded once."""

    def __init__(self, folder: Path, projection: Float, device: str, batch_size: int) -> None:
        self.folder, self.projection, self.device, self.batch_size = folder, projection, device, batch_size
        self._model: Any = None
        info = describe(folder)
        self._tokenizer = PromptTokenizer(info)
        self._tell_mask = info.use_attention_mask

    def __call__(self, captions: Sequence[str]) -> Float:
        distinct = list(dict.fromkeys(captions))
        parts = [self._encode(distinct[i : i + self.batch_size]) for i in range(0, len(distinct), self.batch_size)]
        rows = dict(zip(distinct, np.concatenate(parts), strict=True))
        return np.stack([rows[caption] for caption in captions])

    def _encode(self, captions: list[str]) -> Float:
        import torch

        if self._model is None:
            self._model = _load(self.folder / "text_encoder", self.device)
        tokens = self._tokenizer(captions)
        ids, mask = (torch.from_numpy(part).to(self.device) for part in (tokens.ids, tokens.mask))
        with torch.inference_mode():
            states = self._model(input_ids=ids, attention_mask=mask if self._tell_mask else None).last_hidden_state
            weight = mask.unsqueeze(-1).float()  # [B, K, 1]
            pooled = (states.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
        return np.asarray(pooled.cpu().numpy() @ self.projection.T, np.float32)


def _load(folder: Path, device: str) -> Any:
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"'{folder}' cannot be opened ({error}); copy or train it again") from error
    return model.float().eval().requires_grad_(False).to(device)
