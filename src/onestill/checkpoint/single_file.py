"""What a single safetensors file is, by the names and shapes of its tensors, never by its own name.

A whole checkpoint in the original key layout becomes configs for diffusers' and transformers' classes; widths, depths
and counts are read from the shapes, so that any size of the same architecture can be read. What no shape shows has
the value of every published model of the family: heads of width 64 (8 heads in Stable Diffusion 1), the latents' scale.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from onestill.checkpoint.header import Header, Tensor, read_header, read_numbers
from onestill.errors import CheckpointError

# Each network's tensors start with these in the original key layout, that of the first training code.
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIXES = ("conditioner.embedders.0.transformer.", "cond_stage_model.transformer.")  # SDXL; SD 1
OPEN_CLIP_PREFIXES = ("conditioner.embedders.1.model.", "cond_stage_model.model.")  # SDXL; SD 2

SD, SDXL = "stable-diffusion", "stable-diffusion-xl"
HEAD_WIDTH = 64
V_SPREAD = 0.09  # see `predicts_v`
LORA = re.compile(r"(\.|^|_)lora[._]?(a|b|down|up)\b|\.lora_(A|B|down|up)\.|hada_w|lokr_w|dora_scale", re.IGNORECASE)
LATENT_SCALE = {SD: 0.18215, SDXL: 0.13025}
CLASSES_OF_WIDTH = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "the SDXL refiner"}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ComponentFile:
    """A component of a model whose weights lie in a single file.

    Attributes:
        kind: the class, of diffusers or transformers.
        config: what that class is made from.
        file: the safetensors file.
        prefix: what every name of this component starts with in the file.
        layout: "diffusers" where the names are the module's own; else "unet", "vae", "clip", "open_clip" or "tiny_vae",
            of the original key layout, which `onestill.networks.load` converts.
    """

    kind: str
    config: Mapping[str, Any]
    file: Path
    prefix: str = ""
    layout: str = "diffusers"


@dataclass(frozen=True)
class FileInfo:
    """What a file turned out to be.

    Attributes:
        kind: "checkpoint", "unet", "lora", "autoencoder", "tiny autoencoder", "text encoder" or "unknown".
        family: of the models that it belongs to, for people; "" where the tensors do not show it.
        tensors, parameters: how many.
        dtypes: type -> how many tensors have it.
        notes: what its maker wrote into it.
    """

    path: Path
    kind: str
    family: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]
    notes: Mapping[str, str]


def identify(path: Path) -> FileInfo:
    """Say what a safetensors file is.

    Raises:
        UnsafeFormatError: it is a pickle.
        CheckpointError: it is no safetensors file, or is truncated.
    """
    header = read_header(path)
    tensors = header.tensors
    return FileInfo(
        path,
        _kind(tensors),
        CLASSES_OF_WIDTH.get(_text_width(tensors), ""),
        len(tensors),
        sum(prod(tensor.shape) for tensor in tensors.values()),
        dict(Counter(tensor.dtype for tensor in tensors.values())),
        header.notes,
    )


def _kind(names: Iterable[str]) -> str:
    names = list(names)

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    if any(LORA.search(name) for name in names):
        return "lora"
    if has(UNET_PREFIX):
        return "checkpoint" if has(VAE_PREFIX, *CLIP_PREFIXES, *OPEN_CLIP_PREFIXES) else "unet"
    if has("down_blocks.", "input_blocks."):
        return "unet"
    if has("decoder.up_blocks.", "decoder.up.", VAE_PREFIX):
        return "autoencoder"
    if has("decoder.layers.") or {"1.weight", "3.conv.0.weight"} <= set(names):
        return "tiny autoencoder"
    return "text encoder" if has("text_model.", "embeddings.", "transformer.resblocks.") else "unknown"


def _text_width(tensors: Mapping[str, Tensor]) -> int:
    """The width of the text states that a UNet, or a LoRA for one, attends to; 0 where there is none."""
    for name, tensor in tensors.items():
        is_key = "attn2" in name and ("to_k" in name) and ("up" not in name.split(".")[-2] and "lora_B" not in name)
        if is_key and len(tensor.shape) == 2:
            return tensor.shape[1]
    return 0


# --- a whole checkpoint ---------------------------------------------------------------------------------------------


def component_files(path: Path) -> tuple[str, dict[str, ComponentFile]]:
    """The family of a whole checkpoint, and its networks by diffusers' names for them.

    Raises:
        CheckpointError: the file is something else, lacks a network, or holds an architecture that is not drawn with.
    """
    header = read_header(path)
    kind = _kind(header.tensors)
    hint = {
        "lora": "is a LoRA; give it with --lora on top of a model",
        "unet": "holds only a UNet; give it with --unet on top of a model",
        "tiny autoencoder": "is a tiny autoencoder; give it with --tiny-vae on top of a model",
    }
    if kind != "checkpoint":
        raise CheckpointError(f"'{path}' {hint.get(kind, f'is no model but of the kind: {kind}')}.")
    unet = unet_file(path, header)
    family = SDXL if unet.config.get("addition_embed_type") else SD
    found = {"unet": unet, "vae": _vae(path, header, family), **_text_encoders(path, header, family)}
    return family, found


def unet_file(path: Path, header: Header | None = None) -> ComponentFile:
    """The UNet in a single file, of either layout.

    Raises:
        CheckpointError: there is none, or it is of an architecture that is not drawn with.
    """
    header = header or read_header(path)
    prefix = UNET_PREFIX if any(name.startswith(UNET_PREFIX) for name in header.tensors) else ""
    shapes = _under(header, prefix)
    layout = "unet" if any(name.startswith("input_blocks.") for name in shapes) else "diffusers"
    try:
        config = _unet_config(shapes, _original_names(shapes) if layout == "unet" else _diffusers_names(shapes))
    except (KeyError, IndexError, ValueError) as error:
        missing = f" ({error} is missing)" if isinstance(error, KeyError) else ""
        raise CheckpointError(f"'{path}' holds no whole UNet{missing}; copy the file again.") from error
    if config["in_channels"] != config["out_channels"]:
        raise CheckpointError(
            f"The UNet in '{path}' takes {config['in_channels']} channels, as for inpainting; give another model."
        )
    if prefix and config["cross_attention_dim"] == 1280:
        raise CheckpointError(f"'{path}' is an SDXL refiner, which draws nothing by itself; give the base model.")
    return ComponentFile("UNet2DConditionModel", config, path, prefix, layout)


def predicts_v(path: Path) -> bool:
    """Whether a checkpoint of Stable Diffusion 2 predicts v, as those of 768 px do, and not noise.

    No name or shape tells them apart. One bias does, by its spread: the rule of ComfyUI, whose threshold this is.
    """
    pattern = re.compile(re.escape(UNET_PREFIX) + r"output_blocks\.(\d+)\.1\.transformer_blocks\.0\.norm1\.bias")
    found = {int(match[1]): name for name in read_header(path).tensors if (match := pattern.fullmatch(name))}
    return bool(found) and float(read_numbers(path, found[max(found)]).std()) > V_SPREAD


def _under(header: Header, prefix: str) -> Shapes:
    return {name[len(prefix) :]: value.shape for name, value in header.tensors.items() if name.startswith(prefix)}


class _UNetNames(NamedTuple):
    """Where a UNet's shapes lie, without the `.weight`, and how many layers each of its blocks has."""

    layers: int
    resnets: list[str]  # the first convolution of each resolution
    attentions: list[str]  # the first transformer of each resolution
    middle: str
    conv_in: str
    conv_out: str
    added: str  # takes in the sizes and the pooled text, of SDXL
    guidance: str  # embeds the guidance scale, of consistency models


def _diffusers_names(shapes: Shapes) -> _UNetNames:
    layers = _count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")
    blocks = [f"down_blocks.{block}" for block in range(_count(shapes, r"down_blocks\.(\d+)\."))]
    return _UNetNames(
        layers,
        [f"{block}.resnets.0.conv1" for block in blocks],
        [f"{block}.attentions.0" for block in blocks],
        "mid_block.attentions.0",
        "conv_in",
        "conv_out",
        "add_embedding.linear_1",
        "time_embedding.cond_proj",
    )


def _original_names(shapes: Shapes) -> _UNetNames:
    # Blocks are numbered through, and each resolution but the last ends in one that halves the size.
    layers = min(int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))) - 1
    firsts = range(1, _count(shapes, r"input_blocks\.(\d+)\."), layers + 1)
    return _UNetNames(
        layers,
        [f"input_blocks.{first}.0.in_layers.2" for first in firsts],
        [f"input_blocks.{first}.1" for first in firsts],
        "middle_block.1",
        "input_blocks.0.0",
        "out.2",
        "label_emb.0.0",
        "time_embed.cond_proj",
    )


def _unet_config(shapes: Shapes, names: _UNetNames) -> dict[str, Any]:
    channels = [shapes[f"{name}.weight"][0] for name in names.resnets]
    depths = [_depth(shapes, name) for name in names.attentions]
    keys = [shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    is_linear = len(shapes[f"{names.middle}.proj_in.weight"]) == 2
    config: dict[str, Any] = {
        "sample_size": 64,
        "in_channels": shapes[f"{names.conv_in}.weight"][1],
        "out_channels": shapes[f"{names.conv_out}.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": names.layers,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [depth or 1 for depth in (*depths[:-1], _depth(shapes, names.middle))],
        "cross_attention_dim": keys[0][1],
        # In these configs, for historical reasons, the number of heads.
        "attention_head_dim": [width // HEAD_WIDTH for width in channels] if is_linear else 8,
        "use_linear_projection": is_linear,
    }
    if added := shapes.get(f"{names.added}.weight"):
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": added[1],
        }
    if guidance := shapes.get(f"{names.guidance}.weight"):
        config["time_cond_proj_dim"] = guidance[1]
    return config


def _depth(shapes: Shapes, attention: str) -> int:
    return _count(shapes, re.escape(attention) + r"\.transformer_blocks\.(\d+)\.")


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that a pattern's group finds at the start of the names; 0 for none."""
    return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)


def _vae(path: Path, header: Header, family: str) -> ComponentFile:
    shapes = _under(header, VAE_PREFIX)
    if "decoder.conv_in.weight" not in shapes or "encoder.conv_in.weight" not in shapes:
        raise CheckpointError(f"'{path}' has no whole autoencoder under '{VAE_PREFIX}'; give a file that has one.")
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    config = {
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "scaling_factor": LATENT_SCALE[family],
        "force_upcast": family == SDXL,
        "sample_size": 512 if family == SD else 1024,
    }
    if {"edm_mean", "edm_std"} <= set(header.tensors):  # Playground 2.5's latents, as diffusers reads them
        config["scaling_factor"] = 0.5
        for name, marker in (("latents_mean", "edm_mean"), ("latents_std", "edm_std")):
            config[name] = read_numbers(path, marker).tolist()
    return ComponentFile("AutoencoderKL", config, path, VAE_PREFIX, "vae")


def tiny_vae_file(path: Path) -> ComponentFile:
    """The decoder of TAESD or TAESDXL in a single file: of an AutoencoderTiny, or TAESD's own.

    Raises:
        CheckpointError: the file is something else.
    """
    header = read_header(path)
    is_own = "1.weight" in header.tensors
    names = {name: tensor.shape for name, tensor in header.tensors.items()}
    layers = {
        int(match[1]) - int(is_own): shape
        for name, shape in names.items()
        if (match := re.fullmatch(r"(\d+)\.weight" if is_own else r"decoder\.layers\.(\d+)\.weight", name))
    }
    pattern = r"(\d+)\.conv\.0\.weight" if is_own else r"decoder\.layers\.(\d+)\.conv\.0\.weight"
    blocks = sorted(int(match[1]) - int(is_own) for name in names if (match := re.fullmatch(pattern, name)))
    if 0 not in layers or not blocks or len(layers[0]) != 4:
        raise CheckpointError(f"'{path}' is no tiny autoencoder's decoder; give TAESD's, or TAESDXL's for SDXL.")
    runs = [1]  # blocks in a row belong to one resolution
    for before, after in pairwise(blocks):
        runs = [*runs[:-1], runs[-1] + 1] if after == before + 1 else [*runs, 1]
    width, latent_channels = layers[0][:2]
    config = {
        "latent_channels": latent_channels,
        "decoder_block_out_channels": [width] * len(runs),
        "encoder_block_out_channels": [width] * len(runs),
        "num_decoder_blocks": runs,
        "num_encoder_blocks": [1] * len(runs),  # never loaded
    }
    return ComponentFile("AutoencoderTiny", config, path, "", "tiny_vae" if is_own else "diffusers")


def _text_encoders(path: Path, header: Header, family: str) -> dict[str, ComponentFile]:
    clip, open_clip = _prefix(header, CLIP_PREFIXES), _prefix(header, OPEN_CLIP_PREFIXES)
    found: dict[str, ComponentFile] = {}
    try:
        if clip is not None:
            found["text_encoder"] = ComponentFile(
                "CLIPTextModel", _clip_config(_under(header, clip)), path, clip, "clip"
            )
        if open_clip is not None:
            name, kind = "text_encoder", "CLIPTextModel"
            if family == SDXL:
                name, kind = "text_encoder_2", "CLIPTextModelWithProjection"
            config = _open_clip_config(_under(header, open_clip), family == SDXL)
            found[name] = ComponentFile(kind, config, path, open_clip, "open_clip")
    except KeyError as error:
        raise CheckpointError(f"A text encoder in '{path}' lacks {error}; copy the file again.") from error
    needed = {"text_encoder", "text_encoder_2"} if family == SDXL else {"text_encoder"}
    if missing := needed - set(found):
        raise CheckpointError(f"'{path}' has no {' and no '.join(sorted(missing))}; give a file that has all networks.")
    return found


def _prefix(header: Header, prefixes: Iterable[str]) -> str | None:
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in header.tensors)), None)


def _clip_config(shapes: Shapes) -> dict[str, Any]:
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    layers = _count(shapes, r"encoder\.layers\.(\d+)\.")
    inner = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    places = shapes["embeddings.position_embedding.weight"][0]
    return _text_config(vocabulary, width, layers, inner, places, "quick_gelu", width)


def _open_clip_config(shapes: Shapes, projected: bool) -> dict[str, Any]:
    vocabulary, width = shapes["token_embedding.weight"]
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    inner = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    projection = shapes["text_projection"][1] if projected else width
    # Stable Diffusion 2 attends to the last layer but one, so its config leaves the last one out.
    layers = layers if projected else layers - 1
    return _text_config(vocabulary, width, layers, inner, shapes["positional_embedding"][0], "gelu", projection)


def _text_config(
    vocabulary: int, width: int, layers: int, inner: int, places: int, activation: str, projection: int
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "intermediate_size": inner,
        "max_position_embeddings": places,
        "hidden_act": activation,
        "projection_dim": projection,
        "bos_token_id": 0,
        "eos_token_id": 2,  # the published configs' number, which means: pool at the token with the highest number
        "pad_token_id": 1,
    }
