"""Stable Diffusion's families and SDXL on OpenVINO, without torch: what `onestill.engine.export_sd` wrote.

Weights are mapped from their files, and each network is compiled for the size that is asked for when it is: static
shapes run fastest, and compiling takes seconds where drawing does too. One image at a time, as one fills a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo, read_json
from onestill.engine import Conditioning, to_images, to_pictures
from onestill.engine.text import PromptTokenizer
from onestill.errors import CheckpointError, NotFiniteError, OnestillError

__all__ = ["FOLDER", "FORM", "OpenVinoSdEngine", "has_sd_form"]

FOLDER = "openvino"
FORM = "sd-1"  # of the index; others are of other versions, or the shipped model's
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}

Float = NDArray[np.float32]


def has_sd_form(folder: Path) -> bool:
    """Whether a folder holds this form."""
    index = folder / FOLDER / "index.json"
    return index.is_file() and read_json(index.parent, index.name).get("format") == FORM


class OpenVinoSdEngine:
    """A model of Stable Diffusion's families on OpenVINO. See `onestill.engine.Engine`.

    Args:
        info: the model; its folder must have this form.
        device: only "cpu".
        dtype: "float32" or "bfloat16"; None is the second on a CPU that has instructions for it.
        threads: how many to compute with; None lets OpenVINO choose.

    Raises:
        OnestillError: another device or dtype was asked for.
        CheckpointError: the form is incomplete, or OpenVINO cannot load it.
    """

    name = "openvino"

    def __init__(
        self, info: ModelInfo, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        if (device or "cpu").lower() != "cpu":
            raise OnestillError(f"The engine 'openvino' runs on 'cpu'; for '{device}' choose the engine 'torch'.")
        core = openvino.Core()
        fastest = "bfloat16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "float32"
        if (dtype or fastest) not in PRECISIONS:
            raise OnestillError(f"The engine 'openvino' computes in {' or '.join(PRECISIONS)}, not '{dtype}'.")
        self.info = info
        self.device = "cpu"
        self.dtype = dtype or fastest
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISIONS[self.dtype]}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        exact = config | {"INFERENCE_PRECISION_HINT": "f32"}
        texts = ("text_encoder", "text_encoder_2") if info.is_xl else ("text_encoder",)
        folder = info.path / FOLDER
        self._decoder_scale = np.float32(read_json(folder, "index.json")["decoder_scale"])
        parts = (*texts, "unet", "decoder", "encoder")
        self._parts = {part: _Part(core, folder / f"{part}.xml", config) for part in parts}
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


class _Part:
    """One network, compiled for the last shapes that were asked for. One thread at a time runs it."""

    def __init__(self, core: Any, path: Path, config: dict[str, Any]) -> None:
        self._core, self._path, self._config = core, path, config
        self._lock = threading.Lock()
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._request: Any = None

    def prepare(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compile for these shapes of the inputs that have no fixed ones."""
        with self._lock:
            self._compile(shapes)

    def __call__(self, inputs: dict[str, NDArray[Any]]) -> list[Float]:
        """Every output of one image."""
        with self._lock:
            self._compile({name: value.shape for name, value in inputs.items()})
            self._request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()})
            count = len(self._request.model_outputs)
            # Copies, as the next call writes to the same memory.
            return [np.array(self._request.get_output_tensor(i).data, dtype=np.float32) for i in range(count)]

    def _compile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        if self._shapes is not None and all(self._shapes.get(name, shape) == shape for name, shape in shapes.items()):
            return
        wanted: dict[str, list[int]] = {}
        self._request = None  # two of the largest network would not fit into memory
        try:
            model = self._core.read_model(str(self._path))
            free = {port.any_name for port in model.inputs if port.partial_shape.is_dynamic}
            wanted = {name: list(shape) for name, shape in shapes.items() if name in free}
            if wanted:
                model.reshape(wanted)
            self._request = self._core.compile_model(model, "CPU", self._config).create_infer_request()
        except RuntimeError as error:
            raise CheckpointError(
                f"OpenVINO cannot load '{self._path}' for {shapes}; export the model again."
            ) from error
        self._shapes = {name: tuple(shape) for name, shape in wanted.items()}
