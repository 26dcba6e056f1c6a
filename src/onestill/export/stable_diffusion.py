"""Stable Diffusion's families and SDXL in OpenVINO's form: a folder that draws on a CPU without torch. `[torch]`

Unlike the shipped model's form, which shares its weights with safetensors files, this one holds the only copy: the
billions of weights are converted one network at a time, in half precision, and read back by mapping the file. LoRAs,
another UNet and a tiny decoder are part of what is exported.

The UNet is two graphs. `time` makes one vector of the timestep, the pooled words and SDXL's sizes, always in float32:
to bfloat16, timestep 999 is 1000. `unet` goes on from there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino, opset13

import numpy as np
import torch
from openvino._offline_transformations import apply_moc_transformations
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import patch_model
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

from onestill import __version__
from onestill.checkpoint import MANIFEST, ModelInfo, read_json
from onestill.engine.openvino.stable_diffusion import FOLDER, FORM
from onestill.errors import OnestillError
from onestill.networks.libraries import quiet_libraries
from onestill.networks.load import load_components
from onestill.text.tokenize import write_clip_vocabulary

__all__ = ["WEIGHTS", "export_sd"]

WEIGHTS = ("float16", "int8")
SMALLEST_INT8 = 2**14  # numbers; a smaller constant stays as it is
ROWS = 32
TRACED_LATENT = 16  # of a side; graphs hold for every size, and a small one is traced fast
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
        OnestillError: there are no such weights.
        CheckpointError: the model cannot be loaded.
    """
    if weights not in WEIGHTS:
        raise OnestillError(f"There are no weights in '{weights}'; choose from {', '.join(WEIGHTS)}.")
    target = folder / FOLDER
    target.mkdir(parents=True)
    configs: dict[str, Any] = {}
    decoder = "tiny_vae" if "tiny_vae" in info.networks else "vae"
    names = ["text_encoder", *(["text_encoder_2"] if info.is_xl else []), "unet", "vae", decoder]
    for name in dict.fromkeys(names):
        module = load_components(info, "float16", None if info.loras else (name,))[name]
        configs[name] = module.config
        for part, (wrapped, examples) in _parts(name, module, info, is_decoder=name == decoder).items():
            _write(wrapped, examples, target / part, weights if part != "time" else "float32")
        del module
    _write_configs(info, configs, folder)
    sizes = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    scale = float(configs[decoder].scaling_factor) if decoder == "tiny_vae" else info.scaling_factor
    index = {
        "format": FORM,
        "openvino": str(openvino.__version__),
        "weights": weights,
        "decoder_scale": scale,
        "sizes": sizes,
    }
    (target / "index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


# --- graphs ---------------------------------------------------------------------------------------------------------


class _Text(torch.nn.Module):
    def __init__(self, module: Any, *, is_xl: bool) -> None:
        super().__init__()
        self.module, self.is_xl = module, is_xl

    def forward(self, input_ids: torch.Tensor) -> Any:
        found = self.module(input_ids, output_hidden_states=self.is_xl)
        if not self.is_xl:
            return found[0]
        pooled = getattr(found, "text_embeds", None)
        return found.hidden_states[-2] if pooled is None else (found.hidden_states[-2], pooled)


class _Time(torch.nn.Module):
    """A timestep [1], and for SDXL pooled words [B, P] and sizes [B, 6] -> one vector [B, E]."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.proj, self.embedding = unet.time_proj, unet.time_embedding
        self.add_proj, self.add_embedding = getattr(unet, "add_time_proj", None), getattr(unet, "add_embedding", None)

    def forward(self, timestep: torch.Tensor, pooled: Any = None, time_ids: Any = None) -> torch.Tensor:
        time: torch.Tensor = self.embedding(self.proj(timestep))
        if self.add_proj is None or self.add_embedding is None or pooled is None:
            return time
        sizes = self.add_proj(time_ids.flatten()).reshape(pooled.shape[0], -1)
        added: torch.Tensor = self.add_embedding(torch.cat([pooled, sizes], dim=-1))
        return time + added


class _Given(torch.nn.Module):
    def forward(self, given: torch.Tensor, condition: None = None) -> torch.Tensor:
        return given


class _UNet(torch.nn.Module):
    """The UNet from that vector on."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.module = copy.copy(unet)
        self.module._modules = dict(unet._modules) | {"time_embedding": _Given()}
        self.module.get_time_embed = lambda sample, timestep: timestep
        self.module.get_aug_embed = lambda **_: None

    def forward(self, sample: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        return self.module(sample, time, encoder_hidden_states, return_dict=False)[0]


class _Decoder(torch.nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.module = vae

    def forward(self, latents: torch.Tensor) -> Any:
        return self.module.decode(latents, return_dict=False)[0]


class _Encoder(torch.nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.module = vae

    def forward(self, image: torch.Tensor) -> Any:
        encoded = self.module.encode(image)
        return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


Examples = Mapping[str, torch.Tensor]


def _parts(name: str, module: Any, info: ModelInfo, *, is_decoder: bool) -> dict[str, tuple[torch.nn.Module, Examples]]:
    """The graphs that a network becomes, with inputs to trace them with."""
    side, channels = TRACED_LATENT, info.latent_shape[0]
    latents = torch.randn(1, channels, side, side)
    if name.startswith("text_encoder"):
        return {
            name: (_Text(module, is_xl=info.is_xl), {"input_ids": torch.ones(1, info.max_tokens, dtype=torch.long)})
        }
    if name == "unet":
        if info.embeds_guidance:
            raise OnestillError("A UNet that is told the guidance scale has no OpenVINO form yet; use 'torch'.")
        config = module.config
        timing = {"timestep": torch.tensor([999.0])}
        if info.is_xl:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            timing |= {"pooled": torch.randn(1, pooled), "time_ids": torch.full((1, 6), 512.0)}
        time = copy.deepcopy(_Time(module)).float()
        inputs = {
            "sample": latents,
            "time": torch.randn(1, module.time_embedding.linear_2.out_features),
            "encoder_hidden_states": torch.randn(1, info.max_tokens, config.cross_attention_dim),
        }
        return {"time": (time, timing), "unet": (_UNet(module), inputs)}
    found: dict[str, tuple[torch.nn.Module, Examples]] = {}
    if is_decoder:
        found["decoder"] = (_Decoder(module), {"latents": latents})
    if name == "vae":
        picture = torch.rand(1, 3, side * info.vae_scale_factor, side * info.vae_scale_factor) * 2 - 1
        found["encoder"] = (_Encoder(module), {"image": picture})
    return found


def _write(module: torch.nn.Module, examples: Examples, path: Path, weights: str) -> None:
    module = module.eval()
    if any(parameter.dtype == torch.float16 for parameter in module.parameters()):
        # Linear layers stay in half precision while the graph computes in float32, so that memory holds them once.
        getattr(patch_model, "__make_16bit_traceable")(module)
    frontend = FrontEndManager().load_by_framework("pytorch")
    with torch.no_grad(), quiet_libraries():
        decoder = TorchScriptPythonDecoder(module, example_input=dict(examples))  # must outlive the conversion
        model = frontend.convert(frontend.load(decoder))
    free = {"sample": (2, 3), "latents": (2, 3), "image": (2, 3)}
    model.reshape(
        {
            name: openvino.PartialShape([-1 if i in free.get(name, ()) else n for i, n in enumerate(value.shape)])
            for name, value in examples.items()
        }
    )
    apply_moc_transformations(model, cf=False)
    if weights == "int8":
        _in_int8(model)
    # Beside int8 only small constants are left, among them the scales, which must stay as they are.
    openvino.save_model(model, str(path.with_suffix(".xml")), compress_to_fp16=weights == "float16")


def _in_int8(model: Any) -> None:
    """Keep the larger constants that products read as int8, each row with a scale of its own."""
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "Convolution"):
            continue
        source = node.input_value(1)
        constant = source.get_node()
        if constant.get_type_name() == "Convert":  # from half precision
            constant = constant.input_value(0).get_node()
        if constant.get_type_name() != "Constant" or not _is_worth_int8(constant, node):
            continue
        whole, scale = _rounded(constant.data)
        # Exactly so OpenVINO knows weights that need not be unpacked before they are multiplied.
        kept = opset13.convert(opset13.constant(whole), "f32")
        node.input(1).replace_source_output(opset13.multiply(kept, opset13.constant(scale)).output(0))
    model.validate_nodes_and_infer_types()


def _is_worth_int8(constant: Any, product: Any) -> bool:
    shape = list(constant.shape)
    # A row must be what one output is summed from.
    by_rows = product.get_type_name() == "Convolution" or product.get_attributes()["transpose_b"]
    return by_rows and len(shape) > 1 and prod(shape) >= SMALLEST_INT8


def _rounded(weight: Any) -> tuple[Any, Any]:
    """Weights [O, ...] -> int8 of the same shape, and float32 [O, 1, ...] to multiply it by."""
    rows = weight.reshape(len(weight), -1)
    whole = np.empty(rows.shape, np.int8)
    scales = np.empty((len(rows), 1), np.float32)
    for i in range(0, len(rows), ROWS):  # few at a time, as they stay in the processor's cache
        some = rows[i : i + ROWS].astype(np.float32)
        largest = np.maximum(some.max(axis=1, keepdims=True), -some.min(axis=1, keepdims=True))
        scales[i : i + ROWS] = np.maximum(largest, 1e-12) / 127
        some /= scales[i : i + ROWS]
        whole[i : i + ROWS] = np.rint(some, out=some)
    return whole.reshape(weight.shape), scales.reshape(-1, *[1] * (weight.ndim - 1))


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
    index = {"_class_name": PIPELINE[info.family], **classes, "force_zeros_for_empty_prompt": info.zero_negative}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    scheduler = {"_class_name": "EulerDiscreteScheduler", **info.schedule.to_config()}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
    for name in ("tokenizer", "tokenizer_2") if info.is_xl else ("tokenizer",):
        _write_tokenizer(info, name, folder / name)
    facts = {
        "name": info.name,
        "licence": info.licence,
        "num_inference_steps": info.num_inference_steps,
        "guidance_scale": info.guidance_scale,
        "sampler": info.sampler,
        "unit_noise": info.unit_noise,
        "own_timesteps": {str(steps): list(taken) for steps, taken in info.own_timesteps.items()},
        "made": dict(info.made) | {"exported_from": info.path.name, "by": f"onestill {__version__}"},
    }
    (folder / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n")


def _write_tokenizer(info: ModelInfo, name: str, target: Path) -> None:
    target.mkdir()
    source = info.path / name
    if source.is_dir():
        for file in ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json"):
            if (source / file).is_file():
                (target / file).write_bytes((source / file).read_bytes())
        config = read_json(source, "tokenizer_config.json")
    else:
        write_clip_vocabulary(target)
        config = {"pad_token": "!" if name == "tokenizer_2" else "<|endoftext|>"}
    (target / "tokenizer_config.json").write_text(
        json.dumps({**config, "model_max_length": info.max_tokens}, indent=2) + "\n"
    )
