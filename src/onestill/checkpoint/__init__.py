"""A model's name -> its verified local files -> what it is. Reads JSON and safetensors headers, never a pickle.

A model is a folder in diffusers' format (`model_index.json` and one folder a component). One that this project made
also has `onestill.json`, the manifest: name, version, licence, defaults, and the size and SHA-256 of every file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onestill.checkpoint.files import (
    MANIFEST,
    PICKLE_SUFFIXES,
    cache_folder,
    pickle_error,
    read_json,
    sha256,
    verify,
    weights_file,
    written_whole,
)
from onestill.errors import CheckpointError, ModelNotFoundError, ScheduleError, near
from onestill.schedule import NoiseSchedule

__all__ = [
    "MANIFEST",
    "ModelInfo",
    "cache_folder",
    "describe",
    "list_models",
    "model_path",
    "read_json",
    "resolve",
    "sha256",
    "verify",
    "weights_file",
    "written_whole",
]

DEFAULT_MODEL = "icons"
PIPELINES = {"StableDiffusionPipeline": "stable-diffusion"}
SAMPLER_OF_SCHEDULER = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "LCMScheduler": "consistency",
}


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, read from its folder.

    Attributes:
        name: its name in the manifest, or the folder's.
        height, width: the size in pixels that it draws unless asked otherwise.
        sizes: every (height, width) in pixels that it can draw: a network draws well only what it was trained on.
        latent_shape: (C, h, w) at the default size.
        vae_scale_factor: pixels per latent along each side.
        scaling_factor: what the autoencoder's latents are multiplied by to get the diffusion model's.
        max_tokens: K, tokens a prompt is padded or cut to, the special ones included.
        use_attention_mask: whether the text encoder is told which tokens are padding.
        schedule: the noise schedule it was trained on.
        sampler: the name in `onestill.sampling.SAMPLERS` that its scheduler stands for.
        num_inference_steps, guidance_scale: what it draws with unless asked otherwise; a guidance of 1 is none.
        version, licence: of the model, the licence by its SPDX name; "" if not told.
        styles: style words it was trained with, from the manifest.
        made: how it was made, free-form, from the manifest.
        classes: component -> (library, class), from `model_index.json`.
    """

    name: str
    path: Path
    family: str
    height: int
    width: int
    sizes: tuple[tuple[int, int], ...]
    latent_shape: tuple[int, int, int]
    vae_scale_factor: int
    scaling_factor: float
    max_tokens: int
    use_attention_mask: bool
    schedule: NoiseSchedule
    sampler: str
    num_inference_steps: int = 1
    guidance_scale: float = 1.0
    version: str = ""
    licence: str = ""
    styles: tuple[str, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, str]] = field(default_factory=dict)


# --- finding a model ------------------------------------------------------------------------------------------------


def list_models() -> list[str]:
    """The names of the models that are installed with the package."""
    return sorted(folder.parent.name for folder in _shipped().glob("*/model_index.json"))


def model_path(name: str = DEFAULT_MODEL) -> Path:
    """The folder of a model that is installed with the package, in diffusers' format.

    Raises:
        ModelNotFoundError: there is none of that name.
    """
    names = list_models()
    if name not in names:
        have = f"; installed: {', '.join(names)}." if names else "; none is installed."
        raise ModelNotFoundError(f"There is no model named '{name}'{have}{near(name, names)}")
    return _shipped() / name


def resolve(name_or_path: str | os.PathLike[str] = DEFAULT_MODEL) -> Path:
    """The folder of a model given by its name or as a folder in diffusers' format.

    Raises:
        ModelNotFoundError: there is no such name or path, or it looks like a Hub id (nothing is downloaded).
        UnsafeFormatError: it is a pickle.
        CheckpointError: it is a file or folder, but no model in diffusers' format.
    """
    text = os.fspath(name_or_path)
    if text in list_models():
        return model_path(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.exists():
        raise _refuse_file(path)
    if text.count("/") == 1 and not text.startswith((".", "~", "/")) and not path.suffix:
        raise ModelNotFoundError(
            f"There is no folder '{text}', and models are not downloaded from a hub; give a local diffusers folder."
        )
    if os.sep in text or path.suffix:
        raise ModelNotFoundError(f"There is no model at '{text}'; give a folder in diffusers' format.")
    return model_path(text)


def _shipped() -> Path:
    return Path(__file__).parents[1] / "models"


def _checked_folder(path: Path) -> Path:
    if (path / "model_index.json").is_file():
        return path
    pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise pickle_error(path / pickles[0])
    raise CheckpointError(
        f"'{path}' is no model: it has no model_index.json; give a folder that diffusers' save_pretrained wrote."
    )


def _refuse_file(path: Path) -> CheckpointError:
    with path.open("rb") as file:
        start = file.read(16)
    # What a pickle is named is its author's choice: protocol 2 and later start with 0x80, torch's form is a zip.
    if path.suffix in PICKLE_SUFFIXES or start[:1] == b"\x80" or start[:4] == b"PK\x03\x04":
        return pickle_error(path)
    if path.suffix == ".safetensors":
        return CheckpointError(f"'{path}' is a single file; give a folder in diffusers' format.")
    return CheckpointError(f"'{path}' is a file, not a model; give a folder in diffusers' format.")


# --- what it is -----------------------------------------------------------------------------------------------------


def describe(path: str | os.PathLike[str]) -> ModelInfo:
    """Read what the model in a folder is. Weights are not read; see `verify`.

    Raises:
        CheckpointError: a config is missing, is no JSON, or describes a model that cannot be drawn with.
    """
    folder = Path(path)
    index = read_json(folder, "model_index.json")
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        raise CheckpointError(f"'{folder}' is a {kind}; only these are supported: {', '.join(sorted(PIPELINES))}.")
    unet, vae = read_json(folder, "unet/config.json"), read_json(folder, "vae/config.json")
    text = read_json(folder, "text_encoder/config.json")
    scheduler = read_json(folder, "scheduler/scheduler_config.json")
    manifest = read_json(folder, MANIFEST) if (folder / MANIFEST).is_file() else {}
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        h, w = _pair(unet["sample_size"])
        return ModelInfo(
            name=str(manifest.get("name") or folder.resolve().name),
            path=folder,
            family=PIPELINES[kind],
            height=h * factor,
            width=w * factor,
            sizes=((h * factor, w * factor),),
            latent_shape=(int(unet["in_channels"]), h, w),
            vae_scale_factor=factor,
            scaling_factor=float(vae.get("scaling_factor", 0.18215)),
            max_tokens=_max_tokens(folder, text),
            use_attention_mask=bool(text.get("use_attention_mask", False)),
            schedule=NoiseSchedule.from_config(scheduler),
            sampler=SAMPLER_OF_SCHEDULER.get(str(scheduler.get("_class_name")), "ddim"),
            num_inference_steps=int(manifest.get("num_inference_steps", 1)),
            guidance_scale=float(manifest.get("guidance_scale", 1.0)),
            version=str(manifest.get("version", "")),
            licence=str(manifest.get("licence", "")),
            styles=tuple(str(style) for style in manifest.get("styles", ())),
            made=dict(manifest.get("made", {})),
            classes={name: (str(at[0]), str(at[1])) for name, at in index.items() if isinstance(at, list) and at[0]},
        )
    except ScheduleError as error:
        raise CheckpointError(f"'{folder}' cannot be drawn with: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"The configs in '{folder}' do not fit together ({type(error).__name__}: {error}); save the model again."
        ) from error


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, list) else (int(size), int(size))


def _max_tokens(folder: Path, text: Mapping[str, Any]) -> int:
    positions = int(text["max_position_embeddings"])
    # Saved tokenizers without a limit say 1e30.
    return int(min(read_json(folder, "tokenizer/tokenizer_config.json").get("model_max_length", positions), positions))
