"""A contrastive model as the plain callables that an evaluation takes. Needs torch and transformers.

Shapes: B batch, H W pixels, F width of the image tower, D width of the embeddings that images and texts share.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import describe, resolve
from onestill.engine.device import choose
from onestill.errors import CheckpointError, require
from onestill.evaluate.protocol import Network, Pictures
from onestill.pixels import to_images

if TYPE_CHECKING:
    import torch

    from onestill.networks.contrastive import ContrastiveModel

Float = NDArray[np.float32]


def load_network(
    folder: str | os.PathLike[str],
    text_model: str | os.PathLike[str],
    *,
    name: str | None = None,
    device: str | None = "cpu",
    batch_size: int = 64,
) -> Network:
    """Open a contrastive model for an evaluation.

    Its `features` are the image tower's mean-pooled last tokens (a class token left out), [B, F], before the
    projection: what the Fréchet distance is measured in. `project` is the linear map from there to the space shared
    with text. `texts` are the text encoder's last states, averaged where the mask is 1, and projected.

    Args:
        folder: the contrastive model.
        text_model: the name or folder of the model whose text encoder the contrastive model was trained with.
        name: how reports call it; default: the folder's name.
        device: where torch computes; None and "auto" are a GPU where it has one.
        batch_size: pictures or captions in one call of a network.

    Raises:
        CheckpointError: the folder is something else, or was trained on latents.
        OnestillError: the device is not available; the sentence says why.
        MissingExtraError: torch or transformers is not installed.
    """
    for package in ("torch", "diffusers", "transformers"):
        require(package, "torch")
    from onestill.networks.libraries import quiet_libraries
    from onestill.networks.text_encoder import open_text_encoder

    path, where = Path(folder), choose(device)
    text = describe(resolve(text_model))
    with quiet_libraries():  # whose bars would tear the line of a command's error, or its own bar
        model = _sees_pictures(path)
        encoder = open_text_encoder(str(text.path), text.max_tokens, ("",), text.use_attention_mask).to(where)
    image_projection, text_projection = model.image_projection.weight.numpy(), model.text_projection.weight.numpy()

    def encode(captions: Sequence[str]) -> Float:
        embedding: Float = encoder(captions).embedding.cpu().numpy()
        return np.asarray(embedding @ text_projection.T, np.float32)

    def texts(captions: Sequence[str]) -> Float:
        distinct = list(dict.fromkeys(captions))  # equal captions are encoded once
        parts = [encode(some) for some in _batches(distinct, batch_size)]
        rows = dict(zip(distinct, np.concatenate(parts), strict=True))
        return np.stack([rows[caption] for caption in captions])

    def project(features: NDArray[Any]) -> Float:
        return np.asarray(features @ image_projection.T, np.float32)

    return Network(name or path.name, _features(model, where, batch_size), texts, project, _fingerprint(path))


def _sees_pictures(folder: Path) -> ContrastiveModel:
    """The contrastive model in a folder, which must have been trained on pictures."""
    from onestill.networks.contrastive import ContrastiveModel

    model = ContrastiveModel.load(folder)
    if model.space != "pixels":
        raise CheckpointError(
            f"'{folder}' was trained on {model.space} and cannot see pictures; use one trained on pixels"
        )
    if not isinstance(model.facts.get("image_size"), int):
        raise CheckpointError(f"'{folder}' holds no contrastive model for pictures: contrastive.json has no image_size")
    return model


def _features(model: ContrastiveModel, device: str, batch_size: int) -> Callable[[Pictures], Float]:
    """A function of uint8 pictures [B, H, W, 3] that gives their pooled features [B, F]."""
    import torch
    from torch.nn.functional import interpolate

    size = (model.facts["image_size"],) * 2
    model.to(device)

    def pooled(images: torch.Tensor) -> Float:
        if images.shape[-2:] != size:
            images = interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        found: Float = model.features(images).cpu().numpy()
        return found

    @torch.inference_mode()
    def features(pictures: Pictures) -> Float:
        parts = [np.zeros((0, 1), np.float32)] if len(pictures) == 0 else []
        for some in _batches(pictures, batch_size):
            images = torch.from_numpy(to_images(some))
            # Channels last, as pictures lie in memory: the other layout changes the last digits of the features.
            parts.append(pooled(images.to(device, memory_format=torch.channels_last)))
        return np.concatenate(parts)

    return features


def _batches(rows: Any, size: int) -> Iterator[Any]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([folder / "projections.safetensors", *(folder / "image_tower").glob("*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
