"""The engine of the base install: OpenVINO on the CPU, without torch.

A model's networks come from one of two sources of weights: `shared_weights`, graphs that point into the model's own
safetensors files, which is the shipped model's; and `stored_weights`, graphs with weights of their own, for Stable
Diffusion's families. Everything else is the same for both. A cold start is short because compiled networks are read
from the cache, which takes a fifth of compiling them, and because they load side by side, each in its own thread.

Shapes: B images, C latent channels, h w latent size, H W pixels, E width of the embedding of a timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from onestill.engine.openvino.runtime import shared_core

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo
from onestill.engine.device import runs_on_cpu
from onestill.engine.openvino.cpu import lacks_vnni
from onestill.engine.openvino.network import LARGEST_BATCH, WORTH_COMPILING, Float, Network
from onestill.engine.openvino.shared_weights import SharedWeights
from onestill.engine.openvino.stored_weights import StoredWeights
from onestill.engine.protocol import Conditioning
from onestill.errors import NotFiniteError, OnestillError
from onestill.pixels import to_images, to_pictures
from onestill.text.tokenize import PromptTokenizer

DTYPES = ("float32", "bfloat16", "int8")


class OpenVinoEngine:
    """A model on OpenVINO. See `onestill.engine.protocol.Engine`.

    Args:
        info: the model; its folder must have an OpenVINO form.
        device: "cpu", which None and "auto" are too.
        dtype: "float32", "bfloat16" or "int8"; None is the fastest that the CPU has instructions for, int8 where the
            model has that form. It changes pictures a little: docs/generate.md says how much.
        threads: how many to compute with; None lets OpenVINO choose.
        quick_start: load the UNet of a model with shared weights in half the time and run nothing yet; it then draws a
            quarter slower. Other models ignore it.

    Raises:
        OnestillError: another device or dtype was asked for, or the model or the CPU has no int8.
        CheckpointError: the OpenVINO form is incomplete, was made from other weights, or cannot be loaded.
        NotEnoughMemoryError: the weights do not fit into memory.
    """

    name = "openvino"

    def __init__(
        self,
        info: ModelInfo,
        *,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        quick_start: bool = False,
    ) -> None:
        if not runs_on_cpu(device):
            raise OnestillError(f"The engine 'openvino' runs on 'cpu'; for '{device}' choose the engine 'torch'.")
        if dtype is not None and dtype not in DTYPES:
            raise OnestillError(f"The engine 'openvino' computes in {', '.join(DTYPES)}, not '{dtype}'.")
        core = shared_core()
        source = StoredWeights(info) if info.size_multiple else SharedWeights(info, quick_start=quick_start)
        if dtype == "int8" and not source.has_int8:
            raise OnestillError(f"The model '{info.name}' has no int8 form; choose float32 or bfloat16, or export one.")
        if dtype == "int8" and lacks_vnni():
            raise OnestillError("This CPU has no VNNI, without which int8 draws wrong images; choose float32.")
        self.info = info
        self.device = "cpu"
        self.dtype = dtype or source.fastest_dtype(core)
        self._decoder_scale = np.float32(source.decoder_scale)
        self._decoder_statistics = _statistics(source.decoder_mean, source.decoder_std)
        self._statistics = _statistics(info.latents_mean, info.latents_std)
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self._networks = {
            graph.name: Network(core, graph, options | dict(graph.options), is_large=source.is_large)
            for graph in source.graphs(core, self.dtype)
        }
        self._text_encoders = [self._networks[name] for name in info.text_encoders]
        self._time_embeddings: dict[float, Float] = {}  # filled as timesteps come up; there are few
        # The UNet first, as the others fit beside it. Two large networks at most load at once, for the sake of memory.
        # The encoder waits until there is a picture to encode.
        with ThreadPoolExecutor(max_workers=2 if source.is_large else 3) as pool:
            runs = not (source.is_large or quick_start)
            loading = [
                pool.submit(self._networks["unet"].load, (1, *info.latent_shape), runs=runs),
                pool.submit(self._networks["decoder"].load, (1, *info.latent_shape), runs=runs),
                *(pool.submit(encoder.load, (1, info.max_tokens), runs=runs) for encoder in self._text_encoders),
                pool.submit(self._networks["time"].load, (1,), runs=runs),
            ]
            self._tokenizers = [PromptTokenizer(info, component) for component in info.tokenizers]
            for future in loading:
                future.result()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts."""
        tokens = [tokenize(prompts) for tokenize in self._tokenizers]
        outputs = []
        for encoder, one in zip(self._text_encoders, tokens, strict=True):
            inputs: dict[str, NDArray[Any]] = {"input_ids": one.ids}
            if self.info.use_attention_mask:
                inputs["attention_mask"] = one.mask
            outputs.append(encoder(inputs))
        states = [output[0] for output in outputs]
        # Of SDXL's two encoders the second also gives one vector for the whole prompt.
        pooled = outputs[-1][1] if len(outputs[-1]) > 1 else None
        return Conditioning(
            states[0] if len(states) == 1 else np.concatenate(states, axis=-1),
            tokens[0].cut,
            tokens[0].words_cut,
            pooled,
        )

    def denoise(self, latents: Float, timestep: float, conditioning: Conditioning) -> Float:
        """Latents [B, C, h, w] -> the network's output, of the same shape."""
        inputs = {"sample": latents, "encoder_hidden_states": conditioning.states}
        if conditioning.pooled is None or conditioning.time_ids is None:
            return self._networks["unet"](inputs, time=self._time_embedding(timestep))[0]
        timesteps = np.full(len(latents), timestep, dtype=np.float32)
        added = {"timestep": timesteps, "pooled": conditioning.pooled, "time_ids": conditioning.time_ids}
        return self._networks["unet"](inputs | {"time": self._networks["time"](added)[0]})[0]

    def _time_embedding(self, timestep: float) -> Float:
        """[1, E], the same for every picture."""
        if timestep not in self._time_embeddings:
            inputs = {"timestep": np.array([timestep], dtype=np.float32)}
            self._time_embeddings[timestep] = self._networks["time"](inputs)[0]
        return self._time_embeddings[timestep]

    def decode(self, latents: Float) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures [B, H, W, 3]."""
        mean, std = self._decoder_statistics
        image = self._networks["decoder"]({"latents": latents * std / self._decoder_scale + mean})[0]
        if not np.isfinite(image).all():
            raise NotFiniteError.of("the picture", self.dtype)
        return to_pictures(image)

    def encode_image(self, pictures: NDArray[np.uint8]) -> Float:
        """Pictures [B, H, W, 3] -> latents [B, C, h, w]."""
        mean, std = self._statistics
        raw = self._networks["encoder"]({"image": to_images(pictures)})[0]
        latents: Float = (raw - mean) * np.float32(self.info.scaling_factor) / std
        return latents

    def warm_ups(self, most: int) -> tuple[int, ...]:
        """See `onestill.engine.protocol.Engine`; the larger batch is compiled once so many pictures are asked for."""
        return (1, WORTH_COMPILING) if not self._networks["unet"].is_large and most >= LARGEST_BATCH else (1,)


def _statistics(mean: Sequence[float], std: Sequence[float]) -> Float:
    """Mean and standard deviation of an autoencoder's latents [2, C or 1, 1, 1]; 0 and 1 where there are none."""
    return np.array([mean or (0.0,), std or (1.0,)], dtype=np.float32)[:, :, None, None]
