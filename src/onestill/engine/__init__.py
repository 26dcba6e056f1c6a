"""The runtimes behind one protocol: words to states, noisy latents to a network's output, latents to pictures.

An engine knows nothing of steps, seeds or guidance; `onestill.pipeline` does. It does not change after loading, and
any number of threads may call it at once.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo, describe, resolve, verify
from onestill.errors import CheckpointError, MissingExtraError, OnestillError, near

__all__ = ["ENGINES", "Conditioning", "Engine", "load_engine", "to_pictures"]

ENGINES = ("openvino", "torch")


@dataclass(frozen=True)
class Conditioning:
    """What a network is told of the words.

    Attributes:
        states: [B, K, D] float32, K tokens of D numbers for each prompt.
        tokens_cut: for each prompt, how many of its last tokens did not fit.
    """

    states: NDArray[np.float32]
    tokens_cut: tuple[int, ...]


class Engine(Protocol):
    """A loaded model. B may be any number from 1; latents are scaled as the diffusion model sees them."""

    @property
    def info(self) -> ModelInfo:
        """The model that was loaded."""

    @property
    def name(self) -> str:
        """One of `ENGINES`."""

    @property
    def device(self) -> str:
        """Where it runs: "cpu", "cuda", ..."""

    @property
    def dtype(self) -> str:
        """What it computes in: "float32", "bfloat16" or "float16"."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts; an empty one gives the states that guidance steers away from."""

    def denoise(self, latents: NDArray[np.float32], timestep: int, conditioning: Conditioning) -> NDArray[np.float32]:
        """One call of the network at one timestep: latents [B, C, h, w] -> its output, of the same shape."""

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures [B, H, W, 3]."""

    def encode_image(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures [B, H, W, 3] of a size the model draws -> their most likely latents [B, C, h, w]."""


def load_engine(
    name: str | None = None,
    path: str | os.PathLike[str] = "icons",
    device: str | None = None,
    dtype: str | None = None,
    *,
    threads: int | None = None,
) -> Engine:
    """Load a model into a runtime.

    Args:
        name: one of `ENGINES`; None takes OpenVINO on the CPU where the model has that form, else torch.
        path: a model's name or folder.
        device: "cpu", or for torch also "cuda" and the like; None is "cpu".
        dtype: "float32", "bfloat16" or "float16"; None is what is fastest there: on OpenVINO bfloat16 where the CPU
            has it, else float32; on torch float32 on a CPU and float16 elsewhere.
        threads: how many threads to compute with; None lets the runtime choose.

    Raises:
        OnestillError: the model, engine, device or dtype is not to be had; the sentence says what is.
    """
    if name is not None and name not in ENGINES:
        raise OnestillError(f"There is no engine '{name}'; choose from {', '.join(ENGINES)}.{near(name, ENGINES)}")
    folder = resolve(path)
    info = describe(folder)
    verify(folder, contents=True)
    has_openvino = (folder / "openvino" / "index.json").is_file()
    if name is None:
        name = "openvino" if has_openvino and (device or "cpu").lower() == "cpu" and dtype != "float16" else "torch"
    if name == "openvino":
        if not has_openvino:
            raise CheckpointError(f"'{folder}' has no OpenVINO form; load it with the engine 'torch'.")
        from onestill.engine.openvino import OpenVinoEngine

        return OpenVinoEngine(info, device=device, dtype=dtype, threads=threads)
    for package in ("torch", "diffusers", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("torch", package)
    from onestill.engine.torch import TorchEngine

    return TorchEngine(info, device=device, dtype=dtype, threads=threads)


def to_pictures(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images [B, 3, H, W] in [-1, 1] -> pictures [B, H, W, 3], rounded as diffusers rounds."""
    unit = np.clip(image.astype(np.float32, copy=False) * 0.5 + 0.5, 0.0, 1.0)
    return np.ascontiguousarray((unit * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


def to_images(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures [B, H, W, 3] -> images [B, 3, H, W] in [-1, 1]."""
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def local(folder: Path) -> str:
    """A folder as the libraries take it, absolute so that it is never mistaken for a name on a hub."""
    return str(folder.resolve())
