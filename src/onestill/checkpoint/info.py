"""What a model is: read from a folder's configs, or from the names and shapes in a single file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onestill.checkpoint.additions import Additions, Embedding, Lora, lora_file, read_embedding, weights_of_addition
from onestill.checkpoint.files import MANIFEST, NETWORKS, read_json
from onestill.checkpoint.header import read_header
from onestill.checkpoint.presets import PRESETS, Preset, find_preset
from onestill.checkpoint.scheduler_config import BETAS, EDM, marked_schedule, read_scheduler, scheduled, with_defaults
from onestill.checkpoint.single_file import (
    SD,
    SDXL,
    ComponentFile,
    component_files,
    predicts_v,
    tiny_vae_file,
    unet_file,
)
from onestill.errors import CheckpointError, ScheduleError
from onestill.schedule import NoiseSchedule

PIPELINES = {"StableDiffusionPipeline": SD, "StableDiffusionXLPipeline": SDXL}
UNET_INPUTS = ("in_channels", "cross_attention_dim", "addition_embed_type")  # latents, text states, sizes
NATIVE_PX = {SD: 512, SDXL: 1024}
V2_PX = 768  # of those of Stable Diffusion 2 that predict v
ONE_STEP_PX = 512  # of SDXL Turbo and SD Turbo


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, read from its folder or file.

    Attributes:
        name: its name in the manifest, or the folder's or file's.
        path: its folder, or its single file.
        family: "stable-diffusion" or "stable-diffusion-xl".
        height, width: the size in pixels that it draws unless asked otherwise.
        sizes: every (height, width) in pixels that it was trained on.
        size_multiple: what other sizes' sides must be divisible by, in pixels; 0 where it can draw only `sizes`.
        latent_shape: (C, h, w) at the default size.
        vae_scale_factor: pixels per latent along each side.
        scaling_factor: what the autoencoder's latents are multiplied by to get the diffusion model's.
        latents_mean, latents_std: of the autoencoder's latents, one for each of C; empty for 0 and 1.
        max_tokens: K, tokens a prompt is padded or cut to, the special ones included.
        use_attention_mask: whether the text encoder gets a mask of the padding tokens.
        zero_negative: whether guidance steers away from zeros where no negative prompt is given.
        embeds_guidance: whether the UNet takes the guidance scale as an input, in place of guidance by two passes.
        schedule: the noise schedule it was trained on.
        sampler: the name in `onestill.sampling.SAMPLERS` that its scheduler stands for, or the scheduler's class.
        scheduler: the config of the scheduler, where diffusers' own class draws; empty where a sampler of ours does.
        unit_noise: whether drawing starts from noise of variance 1 rather than sigma^2.
        own_timesteps: number of steps -> the timesteps to take, where they follow no rule.
        num_inference_steps, guidance_scale: what it draws with unless asked otherwise; a guidance of 1 is none.
        preset: the preset it was taken for, "" where its own configs said all.
        version, licence: of the model, the licence by its SPDX name; "" where unknown.
        styles: the styles that its prompts may name, from the manifest.
        made: how it was made, free-form, from the manifest.
        classes: component -> (library, class), from `model_index.json`.
        component_files: the components whose weights lie in single files: a single-file model's, and what was put on
            top of any.
        loras: added to the weights when they are loaded.
        embeddings: trained words for prompts, added likewise.
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
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    size_multiple: int = 0
    zero_negative: bool = False
    embeds_guidance: bool = False
    unit_noise: bool = False
    own_timesteps: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    num_inference_steps: int = 1
    guidance_scale: float = 1.0
    preset: str = ""
    version: str = ""
    licence: str = ""
    styles: tuple[str, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    component_files: Mapping[str, ComponentFile] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @property
    def is_xl(self) -> bool:
        """Whether it has SDXL's two text encoders and takes sizes as inputs."""
        return self.family == SDXL

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that encode prompts."""
        return ("text_encoder", "text_encoder_2")[: 1 + self.is_xl]

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizer of each text encoder."""
        return ("tokenizer", "tokenizer_2")[: 1 + self.is_xl]

    def timesteps(self, num_inference_steps: int) -> list[int]:
        """The falling timesteps at which it draws in this many steps; raises `StepsError` as the schedule does."""
        own = self.own_timesteps.get(num_inference_steps)
        return list(own) if own is not None else self.schedule.timesteps(num_inference_steps)


def describe(path: str | os.PathLike[str], additions: Additions | None = None) -> ModelInfo:
    """Read what the model in a folder or single file is. Weights are not read; see `verify`.

    Args:
        path: what `onestill.checkpoint.resolve` gave.
        additions: what is put on top.

    Raises:
        CheckpointError: a config is missing, is no JSON, or describes a model that cannot be drawn with.
        ModelNotFoundError: an addition does not exist.
    """
    folder = Path(path)
    additions = additions or Additions()
    try:
        said = additions.schedule or (marked_schedule(additions.unet) if _is_file(additions.unet) else "")
        info = _of_file(folder, additions.preset, said) if folder.is_file() else _of_folder(folder, said)
        if additions.preset is not None:
            info = _with_preset(info, additions.preset)
        return _with_additions(info, additions)
    except ScheduleError as error:
        raise CheckpointError(f"'{folder}' cannot be drawn with: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"The configs in '{folder}' do not fit together ({type(error).__name__}: {error}); save the model again."
        ) from error


# --- folders --------------------------------------------------------------------------------------------------------


def _is_file(path: Path | None) -> bool:
    return path is not None and path.is_file()


def _of_folder(folder: Path, said: str) -> ModelInfo:
    index = read_json(folder, "model_index.json")
    kind = str(index.get("_class_name"))
    if kind not in PIPELINES:
        raise CheckpointError(f"'{folder}' is a {kind}; only these are supported: {', '.join(sorted(PIPELINES))}.")
    classes = {name: (str(at[0]), str(at[1])) for name, at in index.items() if isinstance(at, list) and at[0]}
    family = PIPELINES[kind]
    for name in NETWORKS if family == SDXL else [name for name in NETWORKS if name != "text_encoder_2"]:
        if name not in classes:
            raise CheckpointError(f"'{folder}' has no {name}, which a {kind} needs; copy the whole model again.")
    unet, vae = read_json(folder, "unet/config.json"), read_json(folder, "vae/config.json")
    text = read_json(folder, "text_encoder/config.json")
    scheduler = read_json(folder, "scheduler/scheduler_config.json")
    manifest = read_json(folder, MANIFEST) if (folder / MANIFEST).is_file() else {}
    # diffusers makes the class that the index names, whatever class wrote the config.
    scheduler = with_defaults(scheduler, classes.get("scheduler", ("", ""))[1] or None)
    sampling = read_scheduler(scheduled(scheduler, said) if said else scheduler, is_xl=family == SDXL)
    sampler = sampling.sampler
    if "sampler" in manifest:  # which this project wrote, for a schedule that its own samplers draw
        sampler, sampling = str(manifest["sampler"]), sampling._replace(scheduler={})
    if unet["in_channels"] != unet["out_channels"]:
        raise CheckpointError(f"The UNet in '{folder}' is for inpainting; give a text-to-image model.")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    h, w = _pair(unet["sample_size"])
    usual = _usual(scheduler)
    return ModelInfo(
        name=str(manifest.get("name") or folder.resolve().name),
        path=folder,
        family=family,
        height=h * factor,
        width=w * factor,
        sizes=((h * factor, w * factor),),
        latent_shape=(int(unet["in_channels"]), h, w),
        vae_scale_factor=factor,
        scaling_factor=float(vae.get("scaling_factor", 0.18215)),
        max_tokens=_max_tokens(folder, text),
        use_attention_mask=bool(text.get("use_attention_mask", False)),
        schedule=sampling.schedule,
        sampler=sampler,
        scheduler=sampling.scheduler,
        latents_mean=_latents_statistics(vae, family)[0],
        latents_std=_latents_statistics(vae, family)[1],
        # Models of CLIP's families are trained on many shapes, or bear them; ours knows its own size alone.
        size_multiple=factor if classes["text_encoder"][1].startswith("CLIP") else 0,
        zero_negative=family == SDXL and bool(index.get("force_zeros_for_empty_prompt", True)),
        embeds_guidance=unet.get("time_cond_proj_dim") is not None,
        unit_noise=bool(manifest.get("unit_noise", sampling.unit_noise)),
        own_timesteps={
            int(steps): tuple(int(timestep) for timestep in taken)
            for steps, taken in dict(manifest.get("own_timesteps", {})).items()
        },
        num_inference_steps=int(manifest.get("num_inference_steps", usual.num_inference_steps)),
        guidance_scale=float(manifest.get("guidance_scale", usual.guidance_scale)),
        version=str(manifest.get("version", "")),
        licence=str(manifest.get("licence", "")),
        styles=tuple(str(style) for style in manifest.get("styles", ())),
        made=dict(manifest.get("made", {})),
        classes=classes,
    )


def _usual(scheduler: Mapping[str, Any]) -> Preset:
    """Steps and guidance of a model without a manifest: schedulers of few-step models have trailing timesteps."""
    if scheduler.get("_class_name") == "LCMScheduler":
        return PRESETS["lcm"]
    return PRESETS["turbo" if scheduler.get("timestep_spacing") == "trailing" else "base"]


def _latents_statistics(vae: Mapping[str, Any], family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`latents_mean` and `latents_std` of an autoencoder's config, which SDXL's pipeline alone reads."""
    mean, std = (tuple(float(value) for value in vae.get(name) or ()) for name in ("latents_mean", "latents_std"))
    return (mean, std) if family == SDXL and mean and std else ((), ())


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, list) else (int(size), int(size))


def _max_tokens(folder: Path, text: Mapping[str, Any]) -> int:
    positions = int(text["max_position_embeddings"])
    # Saved tokenizers without a limit say 1e30.
    return int(min(read_json(folder, "tokenizer/tokenizer_config.json").get("model_max_length", positions), positions))


# --- single files ---------------------------------------------------------------------------------------------------


def _of_file(path: Path, preset: str | None, said: str) -> ModelInfo:
    family, found = component_files(path)
    notes = read_header(path).notes
    vae, unet, text = found["vae"].config, found["unet"].config, found["text_encoder"].config
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    said = said or marked_schedule(path)
    is_v2 = not said and found["text_encoder"].layout == "open_clip" and predicts_v(path)
    # Only what nothing marks is taken for a model of one step: markers are those of models that were not distilled.
    is_turbo = said in ("", "eps") and not is_v2
    config: dict[str, Any] = {"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_spacing": "trailing"}
    if is_v2:  # the config that Stable Diffusion 2's authors published
        config = {**config, "_class_name": "DDIMScheduler", "timestep_spacing": "leading", "set_alpha_to_one": False}
    elif is_turbo and family == SDXL:
        config["_class_name"] = "EulerAncestralDiscreteScheduler"
    if said or is_v2:
        config = scheduled(config, said or "v")
    sampling = read_scheduler(with_defaults(config), is_xl=family == SDXL)
    kind = "turbo" if is_turbo else "base"
    usual = PRESETS[kind]
    height, width = _noted_size(notes) or ((V2_PX, V2_PX) if is_v2 else _native(family, preset or kind))
    info = ModelInfo(
        name=path.stem,
        path=path,
        family=family,
        height=height,
        width=width,
        sizes=((height, width),),
        latent_shape=(int(unet["in_channels"]), height // factor, width // factor),
        vae_scale_factor=factor,
        scaling_factor=float(vae["scaling_factor"]),
        latents_mean=_latents_statistics(vae, family)[0],
        latents_std=_latents_statistics(vae, family)[1],
        max_tokens=int(text["max_position_embeddings"]),
        use_attention_mask=False,
        schedule=sampling.schedule,
        sampler=sampling.sampler,
        scheduler=sampling.scheduler,
        unit_noise=sampling.unit_noise,
        num_inference_steps=usual.num_inference_steps,
        guidance_scale=usual.guidance_scale,
        size_multiple=factor,
        zero_negative=family == SDXL,
        embeds_guidance="time_cond_proj_dim" in unet,
        licence=notes.get("modelspec.license", ""),
        classes={name: ("", network.kind) for name, network in found.items()},
        component_files=found,
    )
    return replace(info, preset="turbo") if preset is None and is_turbo else info


def _noted_size(notes: Mapping[str, str]) -> tuple[int, int] | None:
    width, _, height = notes.get("modelspec.resolution", "").partition("x")
    valid = width.isdecimal() and height.isdecimal() and 64 <= int(width) <= 2048 and 64 <= int(height) <= 2048
    return (int(height), int(width)) if valid else None


def _native(family: str, preset: str) -> tuple[int, int]:
    side = ONE_STEP_PX if preset == "turbo" else NATIVE_PX[family]
    return side, side


# --- what is put on top ---------------------------------------------------------------------------------------------


def _with_preset(info: ModelInfo, name: str) -> ModelInfo:
    preset = find_preset(name)
    if info.scheduler.get("_class_name") in EDM:
        raise ScheduleError(f"The noise levels of '{info.name}' are EDM's; leave out the preset.")
    schedule = replace(
        info.schedule,
        timestep_spacing=preset.spacing,
        prediction_type=preset.prediction_type or info.schedule.prediction_type,
        steps_offset=1 if preset.spacing == "leading" else 0,
    )
    return replace(
        info,
        schedule=schedule,
        sampler=preset.sampler,
        scheduler={},
        unit_noise=preset.unit_noise,
        own_timesteps=preset.timesteps,
        num_inference_steps=preset.num_inference_steps,
        guidance_scale=preset.guidance_scale,
        preset=name,
    )


def _with_additions(info: ModelInfo, additions: Additions) -> ModelInfo:
    found = dict(info.component_files)
    if additions.unet is not None:
        file, config = weights_of_addition(additions.unet)
        network = unet_file(file)
        found["unet"] = replace(network, config=config or network.config)
        own = (
            info.component_files["unet"].config
            if "unet" in info.component_files
            else read_json(info.path, "unet/config.json")
        )
        for name in UNET_INPUTS:
            if found["unet"].config.get(name) != own.get(name):
                raise CheckpointError(
                    f"The UNet in '{additions.unet}' has {name} {found['unet'].config.get(name)} where that of "
                    f"'{info.name}' has {own.get(name)}: it is for another family; give one of the model's own."
                )
        info = replace(info, embeds_guidance=found["unet"].config.get("time_cond_proj_dim") is not None)
    if additions.tiny_vae is not None:
        file, config = weights_of_addition(additions.tiny_vae)
        network = tiny_vae_file(file)
        found["tiny_vae"] = replace(network, config=config or network.config)
        channels = found["tiny_vae"].config.get("latent_channels", 4)
        if channels != info.latent_shape[0]:
            raise CheckpointError(
                f"The tiny decoder in '{additions.tiny_vae}' takes {channels} channels where '{info.name}' has "
                f"{info.latent_shape[0]}: it is for another family; give TAESD, or TAESDXL for SDXL."
            )
    loras = tuple(replace(lora, path=lora_file(lora.path)) for lora in additions.loras)
    return replace(info, component_files=found, loras=loras, embeddings=_embeddings(info, additions))


def _embeddings(info: ModelInfo, additions: Additions) -> tuple[Embedding, ...]:
    if not additions.embeddings:
        return ()
    configs = {
        name: info.component_files[name].config
        if name in info.component_files
        else read_json(info.path, f"{name}/config.json")
        for name in info.text_encoders
    }
    embeddings: list[Embedding] = []
    first = int(configs["text_encoder"]["vocab_size"])
    for path in additions.embeddings:
        embeddings.append(read_embedding(path, configs, first))
        first += embeddings[-1].count
    return tuple(embeddings)
