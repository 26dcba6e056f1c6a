"""From trained modules to the folder that ships: diffusers' format, and the manifest. Needs `[torch]`.

In this order, as each step reads what the one before wrote:

    save_folder(unet=..., vae=..., text_encoder=..., tokenizer=..., schedule=..., folder=folder)
    export_openvino(folder)                 of `onestill.export.shared_weights`
    write_manifest(folder, name="icons", version="1", licence="Apache-2.0", made={...})

Write the model card and notices before the manifest, which lists every file.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

from onestill import __version__
from onestill.checkpoint import MANIFEST, describe, read_json, sha256, verify, written_whole
from onestill.errors import CheckpointError, OutputError
from onestill.networks.libraries import quiet_libraries
from onestill.schedule import NoiseSchedule

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}
SCHEDULER = "EulerAncestralDiscreteScheduler"


# --- diffusers' format ----------------------------------------------------------------------------------------------


def save_folder(
    *,
    unet: Any,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    schedule: NoiseSchedule | Mapping[str, Any],
    folder: Path,
    dtype: str = "float16",
    force: bool = False,
) -> Path:
    """Save a model as a folder that `diffusers.DiffusionPipeline.from_pretrained` opens. The modules stay as they are.

    Args:
        unet: diffusers' UNet2DConditionModel, with `sample_size` set to the native latent size.
        vae: AutoencoderKL or AutoencoderTiny, its `scaling_factor` set.
        text_encoder: transformers' BertModel or CLIPTextModel.
        tokenizer: its tokenizer, `model_max_length` set to the tokens of a prompt.
        schedule: what the UNet was trained on, or a whole scheduler config; ancestral Euler is the default sampler.
        folder: appears at once when everything is written.
        dtype: "float16" or "float32", of the weights.
        force: replace the folder where it exists.

    Returns:
        The folder.

    Raises:
        OutputError: the folder exists, and `force` is not set.
        CheckpointError: diffusers would draw something else than the modules do, or weights leave float16's range.
    """
    if vae.config.get("shift_factor"):
        raise CheckpointError("diffusers' StableDiffusionPipeline ignores shift_factor; fold it into the weights.")
    modules = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    cast = {name: _cast(name, module, DTYPES[dtype]) for name, module in modules.items()}
    with folder_written_whole(folder, force) as unfinished:
        with quiet_libraries():
            pipeline = diffusers.StableDiffusionPipeline(
                **cast,
                tokenizer=tokenizer,
                scheduler=_scheduler(schedule),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            pipeline.save_pretrained(unfinished, safe_serialization=True)
        for config in unfinished.glob("*/config.json"):
            _rewrite(config)
        for file in unfinished.glob("tokenizer/tokenizer.json"):  # whose indents are a third of it
            compact = json.dumps(read_json(file.parent, file.name), ensure_ascii=False, separators=(",", ":"))
            file.write_text(compact, encoding="utf-8")
        for file in unfinished.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # the libraries leave weights readable by their owner only
        describe(unfinished)
        verify(unfinished)
    return folder


def _cast(name: str, module: Any, dtype: torch.dtype) -> Any:
    # diffusers' own `to` warns of modules to keep in float32 even where there are none.
    cast = torch.nn.Module.to(copy.deepcopy(module), device="cpu", dtype=dtype).eval()
    broken = [key for key, value in cast.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise CheckpointError(f"The {name}'s '{broken[0]}' is not finite in {str(dtype).removeprefix('torch.')}.")
    return cast


def _rewrite(config: Path) -> None:
    known = json.loads(config.read_text())
    # The libraries write down which folder the weights were loaded from: nobody's business where a model ships.
    known.pop("_name_or_path", None)
    if config.parent.name == "text_encoder":
        # transformers loads in the type that a config names, diffusers in float32; in two types, nothing can be drawn.
        known["dtype"] = "float32"
    config.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def _scheduler(schedule: NoiseSchedule | Mapping[str, Any]) -> Any:
    config = dict(schedule.to_config() if isinstance(schedule, NoiseSchedule) else schedule)
    # diffusers warns of any other offset in every pipeline of this kind; trailing spacing does not use it.
    if config.get("timestep_spacing") == "trailing":
        config["steps_offset"] = 1
    return getattr(diffusers, config.pop("_class_name", SCHEDULER)).from_config(config)


# --- the manifest ---------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, **facts: Any) -> Path:
    """Write `onestill.json`: what the model is, and the size and SHA-256 of every other file in its folder.

    Args:
        folder: the model, complete.
        facts: name, version, licence, num_inference_steps, guidance_scale, styles, made (how: data, stages, hours,
            numbers), and anything else that JSON holds.

    Returns:
        The manifest's path.
    """
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).as_posix() != MANIFEST and not file.name.endswith(".part")
    }
    manifest = {"format": FORMAT, "onestill": __version__, **facts, "files": files}
    with written_whole(folder / MANIFEST) as unfinished:
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
    describe(folder)
    verify(folder, contents=True, use_stamps=False)
    return folder / MANIFEST


# --- folders --------------------------------------------------------------------------------------------------------


@contextmanager
def folder_written_whole(folder: Path, force: bool) -> Iterator[Path]:
    """Yield a new folder beside `folder` that takes its place at the end of the body, or is removed if that fails."""
    if folder.exists() and not force:
        raise OutputError(f"'{folder}' exists; choose another folder, or replace it with force.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        unfinished = Path(scratch) / folder.name
        unfinished.mkdir()
        yield unfinished
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        unfinished.rename(folder)
