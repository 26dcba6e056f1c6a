"""A model's networks as torch modules: from a folder or from single files of any key layout, LoRAs added. `[torch]`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open

from onestill.checkpoint import ComponentFile, ModelInfo, read_json, weights_file
from onestill.checkpoint.files import shards
from onestill.checkpoint.header import read_header
from onestill.checkpoint.single_file import UNET_PREFIX
from onestill.errors import CheckpointError
from onestill.networks.libraries import quiet_libraries
from onestill.networks.lora import add_loras
from onestill.networks.text_encoder import CLIP_TOWERS

__all__ = ["DTYPES", "load_components"]

# Only these are ever made from a name in a file, each by its own class; nothing in a model's folder is run.
CLASSES: Mapping[str, Mapping[str, Any]] = {
    "text_encoder": {"BertModel": transformers.BertModel, "CLIPTextModel": transformers.CLIPTextModel},
    "text_encoder_2": CLIP_TOWERS,
    "unet": {"UNet2DConditionModel": diffusers.UNet2DConditionModel},
    "vae": {"AutoencoderKL": diffusers.AutoencoderKL, "AutoencoderTiny": diffusers.AutoencoderTiny},
    "tiny_vae": {"AutoencoderTiny": diffusers.AutoencoderTiny},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MOST_NAMED = 3  # keys in a sentence
# What published files hold beside weights: counts that are made anew, and parts that nothing is drawn with.
IGNORED = r"(position_ids|logit_scale|attn_mask)$"
UNUSED = {  # by a layout or library: the pictures' side of a CLIP, and a projection that not every text encoder has
    "clip": r"(vision_model|visual_projection|text_projection)\.",
    # Products of q, k and v at once become copies; SD 2 leaves the last layer out.
    "open_clip": r"(\.visual\.|text_projection$|transformer\.resblocks\.{layers}\.|in_proj_(weight|bias)$)",
    "tiny_vae": "",
}
SCALES = (".scale_weight", ".weight_scale")  # of a scaled fp8 weight, as ComfyUI writes it
QUANTIZED = re.compile(
    r"(\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant|SCB|absmax|quant_map|weight_format|qweight)"
    r"|quant_state\..*|(^|\.)scaled_fp8)$"
)


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
        network = info.component_files.get(component)
        if network is None and component not in info.classes and component in ("text_encoder_2", "tiny_vae"):
            continue
        kind = network.kind if network is not None else info.classes.get(component, ("", ""))[1]
        if kind not in classes:
            raise CheckpointError(f"'{info.path}' has a {component} of class '{kind}'; known: {', '.join(classes)}.")
        module = _of_file(network, classes[kind]) if network is not None else _of_folder(info, component, kind, dtype)
        parts[component] = module
    add_loras(parts, info)
    _add_embeddings(parts, info)
    return {name: _cast(name, module, dtype) for name, module in parts.items()}


def _add_embeddings(parts: dict[str, Any], info: ModelInfo) -> None:
    """Put trained words behind the rows of each text encoder's vocabulary."""
    for component in [name for name in info.text_encoders if name in parts and info.embeddings]:
        module = parts[component]
        rows = [module.get_input_embeddings().weight]
        for one in info.embeddings:
            with safe_open(str(one.path), framework="pt") as file:
                rows.append(file.get_tensor(one.tensors[component]).reshape(one.count, -1).to(rows[0].dtype))
        table = torch.cat(rows).detach()
        module.set_input_embeddings(torch.nn.Embedding(len(table), table.shape[1], _weight=table))


def _cast(name: str, module: Any, dtype: str) -> Any:
    # SDXL's published autoencoder, whose activations leave float16's range, stays in float32.
    in_float32 = name == "vae" and dtype == "float16" and module.config.force_upcast
    # diffusers' own `to` warns of modules to keep in float32 even where there are none.
    cast = torch.nn.Module.to(module, dtype=torch.float32 if in_float32 else DTYPES[dtype])
    return cast.eval().requires_grad_(False)


def _of_folder(info: ModelInfo, component: str, kind: str, dtype: str) -> Any:
    folder = info.path / component
    file = weights_file(info.path, component, half=dtype != "float32")
    _check_folder(info, component, file)
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


def _check_folder(info: ModelInfo, component: str, file: Path) -> None:
    """Refuse quantized weights, which the libraries would load as they are, and say nothing."""
    if read_json(info.path / component, "config.json").get("quantization_config"):
        raise _quantized_error(file, "quantization_config")
    names = [file.parent / name for name in shards(file)] if file.suffix == ".json" else [file]
    for one in names:
        for name, tensor in read_header(one).tensors.items():
            is_weight = name.endswith(("weight", "bias")) and not tensor.dtype.startswith(("F", "BF"))
            if QUANTIZED.search(name) or is_weight:
                raise _quantized_error(one, name)


# --- single files ---------------------------------------------------------------------------------------------------
#
# diffusers' converters rename the tensors. Its `from_single_file`, which calls the same converters and is no faster
# (0.1 s for SD 1.5's UNet in float16, weights mapped), is not called itself: it wants the config as a folder, leaves
# tensors that the file lacks on the meta device, drops tensors that no class has, and picks text encoders by width.


def _of_file(network: ComponentFile, kind: Any) -> Any:
    """A module with its weights still mapped from the file, not read."""
    with torch.device("meta"), quiet_libraries():
        module = (
            kind(transformers.CLIPTextConfig(**network.config))
            if kind in CLIP_TOWERS.values()
            else kind.from_config(network.config)
        )
    if network.layout == "tiny_vae":
        module.encoder = None  # the file has none
    try:
        with safe_open(str(network.file), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(network.prefix)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{network.file}' cannot be read ({_first_line(error)}); copy it again.") from error
    tensors = _unscaled(tensors, network.file)
    state = _converted(tensors, network, module)
    _check(state, tensors, network, module)
    module.load_state_dict({name: state[name] for name in module.state_dict()}, assign=True)
    _fill_buffers(module)
    return module


def _unscaled(tensors: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """The tensors with scaled fp8 weights multiplied out, and without what only quantized products read."""
    found = {name: value for name, value in tensors.items() if not QUANTIZED.search(name)}
    for name, value in tensors.items():
        owner = name.rpartition(".")[0]
        weight = owner if owner in found else f"{owner}.weight"  # a name that is no module's is one already
        if name.endswith(SCALES) and weight in found:
            scale = value.float().reshape(-1, *(1 for _ in found[weight].shape[1:]))
            if found[weight].dtype in FP8 and len(scale) in (1, len(found[weight])):
                found[weight] = found[weight].float() * scale
                continue
        if QUANTIZED.search(name) and not name.endswith(("scaled_fp8", "scale_input", "input_scale")):
            raise _quantized_error(file, name)
    return found


def _quantized_error(file: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"'{file}' holds quantized weights ('{name}'); give the file in float16, bfloat16, float32 or fp8."
    )


def _converted(tensors: dict[str, torch.Tensor], network: ComponentFile, module: Any) -> dict[str, torch.Tensor]:
    """A network's tensors by the module's own names; a tensor without a counterpart is left out, or keeps its name."""
    match network.layout:
        case "unet":
            named = {UNET_PREFIX + name.removeprefix(network.prefix): value for name, value in tensors.items()}
            found = convert_ldm_unet_checkpoint(named, network.config)
            # The consistency models' embedding of the guidance scale, which diffusers' table lacks.
            if (embedding := tensors.get(f"{network.prefix}time_embed.cond_proj.weight")) is not None:
                found["time_embedding.cond_proj.weight"] = embedding
        case "vae":
            found = convert_ldm_vae_checkpoint(tensors, network.config)
        case "clip":
            found = convert_ldm_clip_checkpoint(tensors)
        case "open_clip":
            found = convert_open_clip_checkpoint(module, tensors, prefix=network.prefix)
        case "tiny_vae":  # TAESD's own file counts a first clamp, which has no weights, as layer 0
            numbered = {name.partition("."): value for name, value in tensors.items()}
            found = {f"decoder.layers.{int(number) - 1}.{rest}": value for (number, _, rest), value in numbered.items()}
        case _:
            found = {name.removeprefix(network.prefix): value for name, value in tensors.items()}
    # Some versions of transformers, and some files, put `text_model.` in front of a text encoder's names.
    own = {name.removeprefix("text_model."): name for name in module.state_dict()}
    return {own.get(name.removeprefix("text_model."), name): value for name, value in found.items()}


def _check(
    state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], network: ComponentFile, module: Any
) -> None:
    """Refuse a file that lacks tensors of a module, or has others, or has them in other shapes."""
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    if missing := sorted(set(shapes) - set(state)):
        raise CheckpointError(f"'{network.file}' lacks {_counted(missing)} of a {network.kind}; copy it again.")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise CheckpointError(
                f"'{name}' in '{network.file}' has the shape {list(state[name].shape)}, not {list(shape)}; it is for "
                "another model."
            )
        if not state[name].is_floating_point():
            raise _quantized_error(network.file, name)
    # Converters rename tensors, or take views of them, but copy none: so an address says which were used.
    used = {state[name].data_ptr() for name in shapes}
    unknown = sorted(name for name, value in tensors.items() if value.data_ptr() not in used)
    unused = UNUSED.get(network.layout, "$^").format(layers=network.config.get("num_hidden_layers"))
    unknown = [name for name in unknown if not re.search(IGNORED, name) and not re.search(unused, name)]
    if unknown:
        raise CheckpointError(f"'{network.file}' has {_counted(unknown)} that no {network.kind} has.")


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
