"""Stable Diffusion's families and SDXL on OpenVINO, without torch: what `onestill.export.stable_diffusion` wrote.

Weights are mapped from their files, and each network is compiled for the size that is asked for when it is: static
shapes run fastest, and compiling takes seconds where drawing does too. That of the model's own size is kept for the
next start. One image at a time, as one fills a CPU.

A form whose weights are int8 is computed in int8 too, unless another type is asked for. What goes into a product is
then rounded to int8 as it comes, by its own largest number, so that nothing has to be calibrated: in text encoders by
OpenVINO, by groups of a token's numbers, as a few of those are a hundred times the others; elsewhere by tokens and, for
convolutions, by images, in the graph, which is faster.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import openvino, opset13

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo, read_json
from onestill.engine.device import runs_on_cpu
from onestill.engine.memory import check_memory_left, is_memory_error, memory_told
from onestill.engine.openvino.compile_cache import compile_kept
from onestill.engine.protocol import Conditioning
from onestill.errors import CheckpointError, NotFiniteError, OnestillError
from onestill.pixels import to_images, to_pictures
from onestill.text.tokenize import PromptTokenizer

__all__ = ["FOLDER", "FORM", "OpenVinoSdEngine"]

FOLDER = "openvino"
FORM = "sd-1"  # of the index; others are of other versions, or the shipped model's
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # of what is not a product of int8 weights
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight in memory
GROUP = 128  # numbers of a row that OpenVINO rounds to int8 together; 32, its own choice, is a third slower
TOGETHER = {"Convolution": (1, 2, 3), "MatMul": (-1,)}  # axes of the numbers that are rounded by one scale here
# By what x comes from: the lowest that x / s gets, and the least s for which that holds. Of the 256 steps from there to
# 1, one must be 0, which pads pictures; and SiLU, never under -0.2785, leaves most of them to what is above 0.
LIMITS = {"Relu": (0.0, 1e-12), "Swish": (-0.25, 1.12)}
ANY = (-128 / 127, 1e-12)

Float = NDArray[np.float32]


class OpenVinoSdEngine:
    """A model of Stable Diffusion's families on OpenVINO. See `onestill.engine.Engine`.

    Args:
        info: the model; its folder must have this form.
        device: "cpu", which None and "auto" are too.
        dtype: "float32", "bfloat16", or "int8" where the form's weights are; None is int8 where they are and the CPU
            has instructions for it, else bfloat16 where it has those.
        threads: how many to compute with; None lets OpenVINO choose.

    Raises:
        OnestillError: another device or dtype was asked for.
        CheckpointError: the form is incomplete, or OpenVINO cannot load it.
        NotEnoughMemoryError: the weights do not fit into memory.
    """

    name = "openvino"

    def __init__(
        self, info: ModelInfo, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        if not runs_on_cpu(device):
            raise OnestillError(f"The engine 'openvino' runs on 'cpu'; for '{device}' choose the engine 'torch'.")
        core = openvino.Core()
        folder = info.path / FOLDER
        index = read_json(folder, "index.json")
        weights = str(index.get("weights", "float16"))
        self.info = info
        self.device = "cpu"
        self.dtype = dtype or _fastest_dtype(core, weights)
        if self.dtype not in PRECISIONS or (self.dtype == "int8" and weights != "int8"):
            known = [name for name in PRECISIONS if name != "int8" or weights == "int8"]
            raise OnestillError(f"This OpenVINO form is computed in {' or '.join(known)}, not '{dtype}'.")
        _check_memory(info, folder, weights, self.dtype)
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.dtype],
            # Said even where it is off, as OpenVINO rounds to int8 by default where the weights are.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if self.dtype == "int8" else 0,
        }
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        exact = config | {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        texts = ("text_encoder", "text_encoder_2") if info.is_xl else ("text_encoder",)
        self._decoder_scale = np.float32(index["decoder_scale"])
        parts = (*texts, "unet", "decoder", "encoder")
        self._parts = {
            part: _Part(core, folder / f"{part}.xml", config, in_int8=self.dtype == "int8" and part not in texts)
            for part in parts
        }
        self._parts["time"] = _Part(core, folder / "time.xml", exact)
        self._texts = [self._parts[name] for name in texts]
        self._tokenizers = [
            PromptTokenizer(info, name) for name in (("tokenizer", "tokenizer_2") if info.is_xl else ("tokenizer",))
        ]
        h, w = info.latent_shape[1:]
        with ThreadPoolExecutor(max_workers=2) as pool:  # the UNet beside the rest, as memory holds one twice meanwhile
            jobs = [
                pool.submit(self._parts["unet"].prepare, {"sample": (1, info.latent_shape[0], h, w)}),
                pool.submit(self._prepare_rest, (1, info.latent_shape[0], h, w)),
            ]
            for job in jobs:
                job.result()

    def _prepare_rest(self, latents: tuple[int, ...]) -> None:
        for part in (*self._texts, self._parts["time"]):
            part.prepare({})
        self._parts["decoder"].prepare({"latents": latents})

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts."""
        tokens = [tokenize(prompts) for tokenize in self._tokenizers]
        states: list[Float] = []
        pooled: list[Float] = []
        for i in range(len(prompts)):
            found = [part({"input_ids": one.ids[i : i + 1]}) for part, one in zip(self._texts, tokens, strict=True)]
            states.append(np.concatenate([one[0] for one in found], axis=-1))
            pooled += [one[1] for one in found if len(one) > 1]
        return Conditioning(
            np.concatenate(states), tokens[0].cut, tokens[0].words_cut, np.concatenate(pooled) if pooled else None
        )

    def denoise(self, latents: Float, timestep: int, conditioning: Conditioning) -> Float:
        """Latents [B, C, h, w] -> the network's output, of the same shape."""
        outputs = []
        for i in range(len(latents)):
            told = conditioning[i : i + 1]
            timing: dict[str, NDArray[Any]] = {"timestep": np.array([timestep], dtype=np.float32)}
            if told.pooled is not None and told.time_ids is not None:
                timing |= {"pooled": told.pooled, "time_ids": told.time_ids}
            time = self._parts["time"](timing)[0]
            inputs = {"sample": latents[i : i + 1], "time": time, "encoder_hidden_states": told.states}
            outputs.append(self._parts["unet"](inputs)[0])
        return np.concatenate(outputs)

    def decode(self, latents: Float) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures [B, H, W, 3].

        Raises:
            NotFiniteError: no numbers came out.
        """
        pictures = []
        for i in range(len(latents)):
            image = self._parts["decoder"]({"latents": latents[i : i + 1] / self._decoder_scale})[0]
            if not np.isfinite(image).all():
                raise NotFiniteError.of("the numbers", self.dtype)
            pictures.append(to_pictures(image))
        return np.concatenate(pictures)

    def encode_image(self, pictures: NDArray[np.uint8]) -> Float:
        """Pictures [B, H, W, 3] -> latents [B, C, h, w]."""
        images = to_images(pictures)
        found = [self._parts["encoder"]({"image": images[i : i + 1]})[0] for i in range(len(images))]
        return np.concatenate(found) * np.float32(self.info.scaling_factor)

    def warm_ups(self, most: int) -> tuple[int, ...]:
        """See `onestill.engine.Engine`; one at a time, however many are asked for."""
        del most
        return (1,)


def _fastest_dtype(core: Any, weights: str) -> str:
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if weights == "int8" and "INT8" in capabilities:
        return "int8"
    return "bfloat16" if "BF16" in capabilities else "float32"


def _check_memory(info: ModelInfo, folder: Path, weights: str, dtype: str) -> None:
    stored = sum(file.stat().st_size for file in folder.glob("*.bin") if file.stem != "encoder")
    count = stored // (1 if weights == "int8" else 2)
    smaller = "export it with --weights int8" if weights != "int8" else "load it with dtype 'int8'"
    if dtype == "int8":
        smaller = "choose a smaller model"
    check_memory_left(info.name, count * BYTES[dtype], dtype, smaller)


class _Part:
    """One network, compiled for the last shapes that were asked for. One thread at a time runs it."""

    def __init__(self, core: Any, path: Path, config: dict[str, Any], *, in_int8: bool = False) -> None:
        self._core, self._path, self._config, self._in_int8 = core, path, config, in_int8
        self._lock = threading.Lock()
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._request: Any = None

    def prepare(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compile for these shapes of the inputs that have no fixed ones, and keep that for the next start."""
        with self._lock, memory_told("cpu", "hold the model"):
            self._compile(shapes, keep=True)

    def __call__(self, inputs: dict[str, NDArray[Any]]) -> list[Float]:
        """Every output of one image."""
        with self._lock, memory_told("cpu", f"run '{self._path.stem}' at this size"):
            self._compile({name: value.shape for name, value in inputs.items()})
            self._request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()})
            count = len(self._request.model_outputs)
            # Copies, as the next call writes to the same memory.
            return [np.array(self._request.get_output_tensor(i).data, dtype=np.float32) for i in range(count)]

    def _compile(self, shapes: dict[str, tuple[int, ...]], *, keep: bool = False) -> None:
        if self._shapes is not None and all(self._shapes.get(name, shape) == shape for name, shape in shapes.items()):
            return
        wanted: dict[str, list[int]] = {}
        self._request = self._shapes = None  # two of the largest network would not fit into memory
        try:
            model = self._core.read_model(str(self._path))
            free = {port.any_name for port in model.inputs if port.partial_shape.is_dynamic}
            wanted = {name: list(shape) for name, shape in shapes.items() if name in free}
            if wanted:
                model.reshape(wanted)
            if self._in_int8:
                _round_products(model)
            if keep:
                compiled = compile_kept(self._core, model, self._config, self._path)
            else:
                compiled = self._core.compile_model(model, "CPU", self._config)
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            if is_memory_error(error):
                raise
            raise CheckpointError(
                f"OpenVINO cannot load '{self._path}' for {shapes}; export the model again."
            ) from error
        self._shapes = {name: tuple(shape) for name, shape in wanted.items()}


def _round_products(model: Any) -> None:
    """Round what goes into each product with int8 weights to int8, by the largest number of the image or of the row.

    A product is linear: that of x / s, times s, is that of x. Written so, the rounding has fixed limits, which is what
    OpenVINO computes in int8.
    """
    known: dict[tuple[str, int, str], tuple[Any, Any]] = {}  # what several products read is rounded once
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in TOGETHER or not _is_int8(node.input_value(1).get_node()):
            continue
        if kind == "MatMul" and node.get_attributes()["transpose_a"]:
            continue  # its rows are columns here; OpenVINO rounds them by groups
        readers = node.output(0).get_target_inputs()
        x = node.input_value(0)
        key = (x.get_node().get_name(), x.get_index(), kind)
        if key not in known:
            low, least = LIMITS.get(x.get_node().get_type_name(), ANY)
            largest = opset13.reduce_max(opset13.abs(x), opset13.constant(np.array(TOGETHER[kind])), True)
            scale = opset13.maximum(largest, opset13.constant(np.float32(least)))
            limits = [opset13.constant(np.float32(limit)) for limit in (low, 1, low, 1)]
            known[key] = scale, opset13.fake_quantize(opset13.divide(x, scale), *limits, 256)
        scale, rounded = known[key]
        node.input(0).replace_source_output(rounded.output(0))
        scaled = opset13.multiply(node.output(0), scale)
        for reader in readers:
            reader.replace_source_output(scaled.output(0))
    model.validate_nodes_and_infer_types()


def _is_int8(weight: Any) -> bool:
    """Whether weights are int8 times a scale, as `onestill.export.stable_diffusion` writes them."""
    if weight.get_type_name() != "Multiply":
        return False
    whole = weight.input_value(0).get_node()
    return bool(whole.get_type_name() == "Convert" and whole.get_input_element_type(0) == openvino.Type.i8)
