"""What is put on top of a model: another UNet, LoRAs, a tiny decoder, and what its files do not say of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onestill.checkpoint.files import read_json
from onestill.checkpoint.header import read_header
from onestill.errors import CheckpointError, ModelNotFoundError

LORA_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's and diffusers'


@dataclass(frozen=True)
class Lora:
    """Low-rank changes to a model's weights: a safetensors file, and what they are multiplied by."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Embedding:
    """Trained vectors for a word of prompts (textual inversion, Gal et al. 2022).

    Attributes:
        token: the word.
        path: a safetensors file.
        tensors: text encoder -> the name of its tensor, [count, width] or [width].
        count: how many vectors.
        first_id: the token id of the first one.
    """

    token: str
    path: Path
    tensors: Mapping[str, str]
    count: int
    first_id: int

    @property
    def tokens(self) -> tuple[str, ...]:
        """One for each vector, named as diffusers names them."""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.count)))


def read_embedding(path: Path, text_encoders: Mapping[str, Mapping[str, Any]], first_id: int) -> Embedding:
    """What a file with an embedding holds: diffusers' form, whose tensor has the word's name, or one named as its file.

    Args:
        path: a safetensors file.
        text_encoders: component -> its config.
        first_id: the id that its first token gets.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"There is no embedding '{path}'; give a .safetensors file.")
    found = read_header(path).tensors
    names = dict(zip(text_encoders, ("clip_l", "clip_g"), strict=False))
    if not set(names.values()) <= set(found):
        if len(found) != 1 or len(text_encoders) > 1:
            raise CheckpointError(
                f"'{path}' has {', '.join(list(found)[:3]) or 'nothing'}, and no embedding for {' and '.join(names)}; "
                "give one that was trained for this family."
            )
        names = dict.fromkeys(names, next(iter(found)))
    shapes = {component: found[name].shape for component, name in names.items()}
    widths = {component: int(config["hidden_size"]) for component, config in text_encoders.items()}
    counts = {shape[0] if len(shape) == 2 else 1 for shape in shapes.values()}
    if any(shape[-1:] != (widths[component],) for component, shape in shapes.items()) or len(counts) > 1:
        raise CheckpointError(f"'{path}' has an embedding of {shapes} for {widths}; it is for another family.")
    (name, *_) = names.values()
    return Embedding(path.stem if name in ("clip_l", "emb_params") else name, path, names, counts.pop(), first_id)


@dataclass(frozen=True)
class Additions:
    """What is put on top of a model.

    Attributes:
        unet: another UNet in place of its own: a safetensors file of either key layout, or a folder with one.
        loras: added to the weights in this order.
        tiny_vae: TAESD, or TAESDXL for SDXL, in place of the decoder: a safetensors file, or a folder with one. The
            two look alike; only the eye tells when it is the wrong one.
        preset: one of `PRESETS`, for steps, sampler and timesteps; None reads them from the model.
        schedule: one of `SCHEDULES`, for what the network's output means; None reads it from the model.
        embeddings: safetensors files with trained words for prompts.
    """

    unet: Path | None = None
    loras: Sequence[Lora] = ()
    tiny_vae: Path | None = None
    preset: str | None = None
    schedule: str | None = None
    embeddings: Sequence[Path] = ()

    @classmethod
    def of(
        cls,
        unet: str | os.PathLike[str] | None = None,
        lora: str | os.PathLike[str] | Mapping[str | os.PathLike[str], float] | None = None,
        tiny_vae: str | os.PathLike[str] | None = None,
        preset: str | None = None,
        schedule: str | None = None,
        embedding: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    ) -> Additions:
        """From what `onestill.load` is given."""
        embeddings = [embedding] if isinstance(embedding, str | os.PathLike) else embedding or ()
        loras = lora if isinstance(lora, Mapping) else {lora: 1.0} if lora is not None else {}
        return cls(
            unet=None if unet is None else Path(unet),
            loras=tuple(Lora(Path(path), float(scale)) for path, scale in loras.items()),
            tiny_vae=None if tiny_vae is None else Path(tiny_vae),
            preset=preset,
            schedule=schedule,
            embeddings=tuple(Path(path).expanduser() for path in embeddings),
        )


def weights_of_addition(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The safetensors file that is meant, and the config beside it in a folder."""
    if path.is_file():
        return path, None
    if not path.is_dir():
        raise ModelNotFoundError(f"There is nothing at '{path}'; give a .safetensors file, or a folder with one.")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"'{path}' has no .safetensors file; give a folder that has one.")
    plain = [file for file in files if ".fp16." not in file.name]
    config = read_json(path, "config.json") if (path / "config.json").is_file() else None
    return (plain or files)[0], config


def lora_file(path: Path) -> Path:
    """The file of a LoRA: itself, or that in a folder as PEFT, diffusers or a trainer wrote it.

    Raises:
        ModelNotFoundError: there is none.
        CheckpointError: a folder has several, and none of them by a name that says which.
    """
    if path.is_file():
        return path
    files = {file.name: file for file in sorted(path.glob("*.safetensors"))} if path.is_dir() else {}
    for name in LORA_NAMES:
        if name in files:
            return files[name]
    if not files:
        raise ModelNotFoundError(f"There is no LoRA '{path}'; give a .safetensors file.")
    if len(files) > 1:
        raise CheckpointError(f"'{path}' has several files ({', '.join(files)}); give one of them.")
    return next(iter(files.values()))
