"""From trained modules to the folder that ships: diffusers' format, OpenVINO's form, the manifest. Needs `[torch]`.

In this order, as each step reads what the one before wrote:

    save_folder(unet=..., vae=..., text_encoder=..., tokenizer=..., schedule=..., folder=folder)
    export_openvino(folder)
    write_manifest(folder, name="icons", version="1", licence="Apache-2.0", made={...})

Write the model card and notices before the manifest, which lists every file.
"""

from __future__ import annotations

import copy
import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino, opset13

import diffusers
import numpy as np
import torch
from openvino._offline_transformations import apply_moc_transformations
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

from onestill import __version__
from onestill.checkpoint import MANIFEST, ModelInfo, describe, read_json, sha256, verify, weights_file, written_whole
from onestill.engine.openvino.icons import OpenVinoEngine
from onestill.engine.openvino.ir import FOLDER, PARTS, point_into_weights, write_index
from onestill.engine.torch.eager import TorchEngine
from onestill.errors import CheckpointError, OutputError
from onestill.export.calibrate import write_int8
from onestill.networks.latents import most_likely_latents
from onestill.networks.libraries import quiet_libraries
from onestill.networks.load import load_components
from onestill.schedule import NoiseSchedule

__all__ = ["export_openvino", "save_folder", "write_manifest"]

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}
SCHEDULER = "EulerAncestralDiscreteScheduler"
MOST_DIFFERENCE = 2e-3  # of the largest value; both compute in float32 with the same weights
SMALLEST_WEIGHT = 16  # numbers; a shorter constant is no weight


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
    with _folder_written_whole(folder, force) as unfinished:
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
            _forget_origin(config)
        _load_in_float32(unfinished / "text_encoder" / "config.json")
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


def _forget_origin(config: Path) -> None:
    # The libraries write down which folder the weights were loaded from: nobody's business where a model ships.
    known = json.loads(config.read_text())
    known.pop("_name_or_path", None)
    config.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def _load_in_float32(config: Path) -> None:
    # transformers loads in the type that a config names, diffusers in float32; in two types, the pipeline cannot draw.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def _scheduler(schedule: NoiseSchedule | Mapping[str, Any]) -> Any:
    config = dict(schedule.to_config() if isinstance(schedule, NoiseSchedule) else schedule)
    # diffusers warns of any other offset in every pipeline of this kind; trailing spacing does not use it.
    if config.get("timestep_spacing") == "trailing":
        config["steps_offset"] = 1
    return getattr(diffusers, config.pop("_class_name", SCHEDULER)).from_config(config)


# --- OpenVINO's form ------------------------------------------------------------------------------------------------


class _TextEncoder(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        return self.module(input_ids, attention_mask=attention_mask)[0]


class _Time(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, timestep: torch.Tensor) -> Any:
        return self.module.time_embedding(self.module.time_proj(timestep))


class _UNet(torch.nn.Module):
    """The UNet from the timestep's embedding on: `time` [1, E] is what `_Time` makes of one timestep."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = copy.copy(module)
        self.module._modules = dict(module._modules) | {"time_embedding": _Given()}
        self.module.get_time_embed = lambda sample, timestep: timestep

    def forward(self, sample: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        return self.module(sample, time, encoder_hidden_states, return_dict=False)[0]


class _Given(torch.nn.Module):
    def forward(self, given: torch.Tensor, condition: None = None) -> torch.Tensor:
        return given


class _Decoder(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, latents: torch.Tensor) -> Any:
        return self.module.decode(latents, return_dict=False)[0]


class _Encoder(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return most_likely_latents(self.module, image)


_WRAPPERS = {
    "text_encoder": _TextEncoder,
    "time": _Time,
    "unet": _UNet,
    "decoder": _Decoder,
    "encoder": _Encoder,
}


def export_openvino(folder: Path, *, int8: bool = False) -> Path:
    """Add OpenVINO's form to a model's folder, sharing its weights, and check it against torch.

    What was there before is replaced once the new form draws as torch does. Write the manifest after this.

    Args:
        folder: the model, in diffusers' format.
        int8: also measure which networks draw well in int8; a minute or two. See `onestill.export.calibrate`.

    Returns:
        `folder/openvino`.

    Raises:
        CheckpointError: the folder is no such model, or OpenVINO computes something else than torch.
    """
    info = describe(folder)
    verify(folder)
    components = load_components(info)
    target = folder / FOLDER
    with _folder_written_whole(target, force=True) as unfinished:
        weights = {}
        for part, component in PARTS.items():
            weights[part] = weights_file(folder, component)
            module = components[component]
            _write_part(_WRAPPERS[part](module), _examples(info, part, module), unfinished / part, weights[part])
        write_index(unfinished, weights, str(openvino.__version__))
    try:
        _check_openvino(info)
        if int8:
            write_int8(info)
    except Exception:
        shutil.rmtree(target)
        raise
    return target


def _examples(info: ModelInfo, part: str, module: Any) -> dict[str, torch.Tensor]:
    """Inputs to trace with; a first axis of 2 becomes the batch."""
    generator = torch.Generator().manual_seed(0)
    tokens, latents = (2, info.max_tokens), (2, *info.latent_shape)
    match part:
        case "text_encoder":
            ids = {"input_ids": torch.ones(tokens, dtype=torch.long)}
            return ids | ({"attention_mask": torch.ones(tokens, dtype=torch.long)} if info.use_attention_mask else {})
        case "time":
            return {"timestep": torch.tensor([999.0])}
        case "unet":
            width = module.time_embedding.linear_2.out_features
            return {
                "sample": torch.randn(latents, generator=generator),
                "time": torch.randn(1, width, generator=generator),
                "encoder_hidden_states": torch.randn(*tokens, module.config.cross_attention_dim, generator=generator),
            }
        case "decoder":
            return {"latents": torch.randn(latents, generator=generator)}
    return {"image": torch.rand(2, 3, info.height, info.width, generator=generator) * 2 - 1}


def _write_part(module: torch.nn.Module, examples: dict[str, torch.Tensor], path: Path, weights: Path) -> None:
    shapes = {
        name: openvino.PartialShape([-1 if len(value) == 2 else 1, *value.shape[1:]])
        for name, value in examples.items()
    }
    # Not `openvino.convert_model`, which reports its use over the network. The tracer warns of every Python branch that
    # it passes; the result is checked instead.
    frontend = FrontEndManager().load_by_framework("pytorch")
    with torch.no_grad(), quiet_libraries():
        decoder = TorchScriptPythonDecoder(module.eval(), example_input=examples)  # must outlive the conversion
        model = frontend.convert(frontend.load(decoder))
    model.reshape(shapes)
    apply_moc_transformations(model, cf=False)  # the fusions that `convert_model` makes
    _keep_as_float16(model)
    # OpenVINO counts its names up over a process; named by their places, the same model gives the same file.
    model.set_friendly_name(path.name)
    for i, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}_{i}")
        if node.get_type_name() != "Parameter":  # whose names are the inputs'
            for output in node.outputs():
                output.get_tensor().set_names(set())
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole.xml"
        openvino.serialize(model, str(whole), str(whole.with_suffix(".bin")))
        graph, rest = point_into_weights(whole.read_text(), whole.with_suffix(".bin").read_bytes(), weights)
    path.with_suffix(".xml.gz").write_bytes(gzip.compress(graph.encode(), mtime=0))
    path.with_suffix(".bin").write_bytes(rest)


def _keep_as_float16(model: Any) -> None:
    """Store the constants that float16 holds exactly in that type, which the weights of such a folder are.

    OpenVINO's own compression rounds everything, and ruins the table of frequencies that timesteps are embedded by.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32:
            continue
        value = node.data
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if value.size >= SMALLEST_WEIGHT and np.array_equal(half.astype(np.float32), value):
            node.output(0).replace(opset13.convert(opset13.constant(half), "f32").output(0))


def _check_openvino(info: ModelInfo) -> None:
    slow, fast = TorchEngine(info, device="cpu", dtype="float32"), OpenVinoEngine(info, dtype="float32")
    generator = np.random.default_rng(0)
    words, twin = slow.encode(["a red apple", ""]), fast.encode(["a red apple", ""])
    latents = generator.standard_normal((2, *info.latent_shape)).astype(np.float32)
    pictures = generator.integers(0, 256, (2, info.height, info.width, 3), dtype=np.uint8)
    last = info.schedule.num_train_timesteps - 1
    pairs = {
        "text_encoder": (words.states, twin.states),
        "unet": (slow.denoise(latents, last, words), fast.denoise(latents, last, words)),
        "decoder": (slow.decode(latents).astype(np.float32), fast.decode(latents).astype(np.float32)),
        "encoder": (slow.encode_image(pictures), fast.encode_image(pictures)),
    }
    for part, (expected, found) in pairs.items():
        difference = np.abs(expected - found).max() / max(np.abs(expected).max(), 1e-6)
        if not difference <= (2 / 255 if part == "decoder" else MOST_DIFFERENCE):
            raise CheckpointError(f"OpenVINO's {part} differs from torch's by {difference:.1%}; its form was removed.")


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


# --- helpers --------------------------------------------------------------------------------------------------------


@contextmanager
def _folder_written_whole(folder: Path, force: bool) -> Iterator[Path]:
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
