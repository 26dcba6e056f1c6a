"""Stable Diffusion's families and SDXL in OpenVINO's form: a folder that draws on a CPU without torch. `[torch]`

Unlike the shipped model's form, which shares its weights with safetensors files, this one holds the only copy: the
billions of weights are converted one network at a time, in half precision, and read back by mapping the file. LoRAs,
another UNet and a tiny decoder are part of what is exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino

from onestill import __version__
from onestill.checkpoint import MANIFEST, ModelInfo, read_json, sha256
from onestill.engine.openvino.int8 import store_weights
from onestill.engine.openvino.stored_weights import FOLDER, FORM
from onestill.errors import OnestillError
from onestill.export.convert import convert, example_inputs, wrapped
from onestill.networks.load import load_components
from onestill.text.tokenize import CLIP_END, CLIP_PADDING, write_clip_vocabulary

WEIGHTS = ("float16", "int8")
# The latent size to trace with: small, as that is traced fast, and one that does not halve evenly, for which the UNet
# doubles to the size that it halved. Graphs hold for every size.
TRACED = (17, 19)
FREE_AXES = {"sample": (2, 3), "latents": (2, 3), "image": (2, 3)}  # height and width
PIPELINE = {"stable-diffusion": "StableDiffusionPipeline", "stable-diffusion-xl": "StableDiffusionXLPipeline"}


def export_sd(info: ModelInfo, folder: Path, *, weights: str = "float16") -> Path:
    """Write a model in OpenVINO's form, with all that drawing needs: configs, tokenizers, graphs and weights.

    Args:
        info: the model, as `describe` gives it.
        folder: a new folder.
        weights: "float16", or "int8" for the larger ones, by rows: half the size, a third of the time on a CPU with
            instructions for it, and a little loss.

    Returns:
        `folder`.

    Raises:
        OnestillError: there are no such weights, or the model has no such form.
        CheckpointError: the model cannot be loaded.
    """
    if weights not in WEIGHTS:
        raise OnestillError(f"There are no weights in '{weights}'; choose from {', '.join(WEIGHTS)}.")
    if info.embeddings:
        raise OnestillError("Embeddings have no OpenVINO form yet; use the engine 'torch'.")
    if info.embeds_guidance:
        raise OnestillError("A UNet that takes the guidance scale has no OpenVINO form yet; use the engine 'torch'.")
    target = folder / FOLDER
    target.mkdir(parents=True)
    configs: dict[str, Any] = {}
    decoder = "tiny_vae" if "tiny_vae" in info.component_files else "vae"
    for name in dict.fromkeys((*info.text_encoders, "unet", "vae", decoder)):
        module = load_components(info, "float16", None if info.loras else (name,))[name]
        configs[name] = module.config
        for part in _parts(name, decoder):
            model = convert(wrapped(part, module, info), example_inputs(part, module, info, 1, TRACED), FREE_AXES)
            _save(model, target / f"{part}.xml", "float32" if part == "time" else weights)
            del model
        del module
    _write_configs(info, configs, folder)
    sizes = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    scale = float(configs[decoder].scaling_factor) if decoder == "tiny_vae" else info.scaling_factor
    index = {
        "format": FORM,
        "openvino": str(openvino.__version__),
        "weights": weights,
        "decoder_scale": scale,
        "decoder_statistics": ((), ()) if decoder == "tiny_vae" else (info.latents_mean, info.latents_std),
        "sizes": sizes,
        "sha256": {name: sha256(target / name) for name in sizes},
    }
    (target / "index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _parts(component: str, decoder: str) -> list[str]:
    """The graphs that a component becomes; `decoder` is the component that decodes."""
    if component == "unet":
        return ["time", "unet"]
    if component.startswith("text_encoder"):
        return [component]
    # A tiny decoder stands in for half of the autoencoder; pictures are encoded by the other half all the same.
    return [*(["decoder"] if component == decoder else []), *(["encoder"] if component == "vae" else [])]


def _save(model: Any, path: Path, weights: str) -> None:
    if weights == "int8":
        store_weights(model)
    # Beside int8 only small constants are left, among them the scales, which must stay as they are.
    openvino.save_model(model, str(path), compress_to_fp16=weights == "float16")


# --- configs and tokenizers -----------------------------------------------------------------------------------------


def _write_configs(info: ModelInfo, configs: Mapping[str, Any], folder: Path) -> None:
    for name, config in configs.items():
        path = folder / name / "config.json"
        path.parent.mkdir()
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        if name == "unet":
            values |= {"sample_size": list(info.latent_shape[1:])}
        path.write_text(json.dumps(values, indent=2, default=str) + "\n")
    classes = {
        name: ["transformers" if name.startswith("text") else "diffusers", kind]
        for name, (_, kind) in info.classes.items()
        if name in configs
    }
    # What diffusers' scheduler draws is written as it was, and has no sampler of ours in the manifest.
    scheduler = dict(info.scheduler) or {"_class_name": "EulerDiscreteScheduler", **info.schedule.to_config()}
    classes["scheduler"] = ["diffusers", scheduler["_class_name"]]
    index = {"_class_name": PIPELINE[info.family], **classes, "force_zeros_for_empty_prompt": info.zero_negative}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    for name in info.tokenizers:
        _write_tokenizer(info, name, folder / name)
    facts = {
        "name": info.name,
        "licence": info.licence,
        "num_inference_steps": info.num_inference_steps,
        "guidance_scale": info.guidance_scale,
        **({} if info.scheduler else {"sampler": info.sampler}),
        "unit_noise": info.unit_noise,
        "own_timesteps": {str(steps): list(taken) for steps, taken in info.own_timesteps.items()},
        "made": dict(info.made) | {"exported_from": info.path.name, "by": f"onestill {__version__}"},
    }
    (folder / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n")


def _write_tokenizer(info: ModelInfo, name: str, target: Path) -> None:
    target.mkdir()
    source = info.path / name
    if source.is_dir():
        for file in ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
            if (source / file).is_file():
                (target / file).write_bytes((source / file).read_bytes())
        config = read_json(source, "tokenizer_config.json")
    else:
        write_clip_vocabulary(target)
        config = {"pad_token": CLIP_PADDING.get(name, CLIP_END)}
    (target / "tokenizer_config.json").write_text(
        json.dumps({**config, "model_max_length": info.max_tokens}, indent=2) + "\n"
    )
