"""A model's networks as torch modules: from a folder or from single files of any key layout, LoRAs added. `[torch]`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from onestill.checkpoint import ModelInfo, Network, weights_file
from onestill.checkpoint.layout import (
    Place,
    clip_place,
    open_clip_place,
    short_text_name,
    tiny_vae_place,
    unet_place,
    vae_place,
)
from onestill.errors import CheckpointError
from onestill.networks.libraries import quiet_libraries
from onestill.networks.lora import add_loras

__all__ = ["DTYPES", "load_components", "place_of"]

# Only these are ever made from a name in a file, each by its own class; nothing in a model's folder is run.
CLIP = {
    "CLIPTextModel": transformers.CLIPTextModel,
    "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection,
}
CLASSES: Mapping[str, Mapping[str, Any]] = {
    "text_encoder": {"BertModel": transformers.BertModel, "CLIPTextModel": transformers.CLIPTextModel},
    "text_encoder_2": CLIP,
    "unet": {"UNet2DConditionModel": diffusers.UNet2DConditionModel},
    "vae": {"AutoencoderKL": diffusers.AutoencoderKL, "AutoencoderTiny": diffusers.AutoencoderTiny},
    "tiny_vae": {"AutoencoderTiny": diffusers.AutoencoderTiny},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_NAMED = 3  # keys in a sentence
# What published files hold beside weights: counts that are made anew, and parts that nothing is drawn with.
IGNORED = ("position_ids", "logit_scale", "transformer.text_model.embeddings.position_ids", "attn_mask")


def load_components(info: ModelInfo, dtype: str = "float32", only: Collection[str] | None = None) -> dict[str, Any]:
    """The networks of a model as torch modules, in evaluation mode on the CPU: text_encoder, unet, vae; where the model
    has them, text_encoder_2 and tiny_vae. LoRAs are added to the weights.

    Args:
        info: the model.
        dtype: one of `DTYPES`.
        only: the names of those to load; None loads all. A model with LoRAs needs all that they change.

    Raises:
        CheckpointError: the weights do not fit the configs, or a class is not supported; or a LoRA is for another
            family.
    """
    parts = {}
    for component, classes in CLASSES.items():
        if only is not None and component not in only:
            continue
        network = info.networks.get(component)
        if network is None and component not in info.classes and component in ("text_encoder_2", "tiny_vae"):
            continue
        kind = network.kind if network is not None else info.classes.get(component, ("", ""))[1]
        if kind not in classes:
            raise CheckpointError(f"'{info.path}' has a {component} of class '{kind}'; known: {', '.join(classes)}.")
        module = _of_file(network, classes[kind]) if network is not None else _of_folder(info, component, kind, dtype)
        parts[component] = module
    add_loras(parts, info)
    return {name: _cast(name, module, dtype) for name, module in parts.items()}


def _cast(name: str, module: Any, dtype: str) -> Any:
    # Kept whole: a published autoencoder whose activations leave float16's range.
    kept = name == "vae" and dtype == "float16" and module.config.force_upcast
    # diffusers' own `to` warns of modules to keep in float32 even where there are none.
    cast = torch.nn.Module.to(module, dtype=torch.float32 if kept else DTYPES[dtype])
    return cast.eval().requires_grad_(False)


def _of_folder(info: ModelInfo, component: str, kind: str, dtype: str) -> Any:
    folder = info.path / component
    file = weights_file(info.path, component, half=dtype != "float32")
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if "fp16." in file.name:
        options["variant"] = "fp16"
    # A LoRA is added in float32, as half of a sum of halves is not the half of the sum.
    wanted = torch.float32 if info.loras else DTYPES[dtype]
    options["dtype" if component.startswith("text_encoder") else "torch_dtype"] = wanted
    try:
        with quiet_libraries():
            # Absolute, so that the libraries never take it for a name on a hub.
            return CLASSES[component][kind].from_pretrained(str(folder.resolve()), **options)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"The weights in '{folder}' do not fit its config ({_first_line(error)}); copy it again."
        ) from error


# --- single files ---------------------------------------------------------------------------------------------------


def _of_file(network: Network, kind: Any) -> Any:
    """A module with its weights still mapped from the file, not read."""
    with torch.device("meta"), quiet_libraries():
        module = (
            kind(transformers.CLIPTextConfig(**network.config))
            if kind in CLIP.values()
            else kind.from_config(network.config)
        )
    if network.layout == "tiny_vae":
        module.encoder = None  # the file has none
    names = list(module.state_dict())
    try:
        with safe_open(str(network.file), framework="pt") as file:
            found = _converted(file, network, {name: value.shape for name, value in module.state_dict().items()})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{network.file}' cannot be read ({_first_line(error)}); copy it again.") from error
    missing = sorted(set(names) - set(found))
    if missing:
        raise CheckpointError(f"'{network.file}' lacks {_counted(missing)} of a {network.kind}; copy it again.")
    module.load_state_dict(found, assign=True)
    _fill_buffers(module)
    return module


def _converted(file: Any, network: Network, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    place = place_of(network.layout, network.config, shapes)
    there = {name.removeprefix(network.prefix): name for name in list(file.keys()) if name.startswith(network.prefix)}
    found, used = {}, set()
    for name, shape in shapes.items():
        at = place(name)
        key = next((key for key in _spellings(at.name, network.layout) if key in there), None) if at else None
        if at is None or key is None:
            continue
        used.add(key)
        value = file.get_tensor(there[key])
        value = value.chunk(3)[at.third] if at.third is not None else value
        value = value.T.contiguous() if at.transposed else value
        if value.numel() == shape.numel() and value.squeeze().shape == shape:
            value = value.reshape(shape)  # an attention's 1 x 1 convolution, which is a linear layer here
        if value.shape != shape:
            raise CheckpointError(
                f"'{there[key]}' in '{network.file}' has the shape {list(value.shape)}, not {list(shape)}; it is for "
                "another model."
            )
        found[name] = value
    unknown = [there[key] for key in there if key not in used and not key.endswith(IGNORED)]
    if unknown and network.layout not in ("tiny_vae", "open_clip", "clip"):
        raise CheckpointError(f"'{network.file}' has {_counted(sorted(unknown))} that no {network.kind} has.")
    return found


def _spellings(name: str, layout: str) -> tuple[str, ...]:
    return (name, name.removeprefix("text_model.")) if layout == "clip" else (name,)


def place_of(layout: str, config: Mapping[str, Any], names: Mapping[str, Any]) -> Callable[[str], Place | None]:
    """The function that tells where a module's tensor lies in a file of this layout; see `Network.layout`."""
    match layout:
        case "unet":
            ups = frozenset(
                int(name.split(".")[1]) for name in names if name.startswith("up_blocks.") and ".attentions." in name
            )
            return partial(unet_place, layers=config["layers_per_block"], attention_ups=ups)
        case "vae":
            return partial(vae_place, levels=len(config["block_out_channels"]))
        case "clip":
            return lambda name: clip_place(short_text_name(name))
        case "open_clip":
            return lambda name: open_clip_place(short_text_name(name))
        case "tiny_vae":
            return tiny_vae_place
    return Place


def _fill_buffers(module: torch.nn.Module) -> None:
    """Make what is no weight and so lies in no file: the counts 0, 1, 2, ... of a text encoder's places."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta and name == "position_ids":
                owner.register_buffer(name, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False)


def _counted(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:MOST_NAMED])
    more = len(names) - MOST_NAMED
    return f"{len(names)} tensors ({shown}{f' and {more} more' if more > 0 else ''})"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
