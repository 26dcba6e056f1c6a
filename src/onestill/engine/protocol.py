"""The protocol of the runtimes: prompts to states, noisy latents to a network's output, latents to pictures.

An `Engine` knows nothing of steps, seeds or guidance; `onestill.pipeline` does. An `EndToEndEngine` can also take them
all at once, in a `GenerationRequest`. An engine does not change after loading, and any number of threads may call it
at once.

Shapes: B prompts or pictures, K tokens, D width of a token's state, P width of a pooled prompt, N noises, C latent
channels, h w latent size, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo
from onestill.schedule import Array, add_noise

__all__ = [
    "ENGINES",
    "Conditioning",
    "EndToEndEngine",
    "Engine",
    "GenerationRequest",
    "GenerationResult",
    "TorchOptions",
    "batch_sizes",
    "first_latents",
]

ENGINES = ("openvino", "torch")


@dataclass(frozen=True)
class Conditioning:
    """What a network is conditioned on: the encoded prompts, and what else it takes beside latents and timestep.

    Attributes:
        states: [B, K, D] float32.
        tokens_cut: for each prompt, how many of its last tokens did not fit.
        words_cut: for each prompt, its end from the first word that did not fit whole; "" where all fitted or nobody
            asks.
        pooled: [B, P] float32, one vector for each prompt as a whole; SDXL's networks only.
        time_ids: [B, 6] float32, SDXL's micro-conditioning in pixels: the height and width that the picture is said to
            have had, the top and left that were cut off, the height and width asked for.
        guidance_scale: how hard to follow the prompt, for networks that take it as an input (LCM's); others ignore it.
    """

    states: NDArray[np.float32]
    tokens_cut: tuple[int, ...]
    words_cut: tuple[str, ...] = ()
    pooled: NDArray[np.float32] | None = None
    time_ids: NDArray[np.float32] | None = None
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.words_cut:
            object.__setattr__(self, "words_cut", ("",) * len(self.tokens_cut))

    @classmethod
    def joined(cls, some: Sequence[Conditioning]) -> Conditioning:
        """Several as one, prompt after prompt; the guidance scale is the first one's."""

        def rows(arrays: list[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
            present = [array for array in arrays if array is not None]
            return np.concatenate(present) if present else None

        return cls(
            np.concatenate([one.states for one in some]),
            tuple(cut for one in some for cut in one.tokens_cut),
            tuple(words for one in some for words in one.words_cut),
            rows([one.pooled for one in some]),
            rows([one.time_ids for one in some]),
            some[0].guidance_scale,
        )

    def __getitem__(self, part: slice) -> Conditioning:
        """The conditioning of some of the prompts."""
        return Conditioning(
            self.states[part],
            self.tokens_cut[part],
            self.words_cut[part],
            None if self.pooled is None else self.pooled[part],
            None if self.time_ids is None else self.time_ids[part],
            self.guidance_scale,
        )


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
        """What it computes in: "float32", "bfloat16", "float16" or "int8"."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts; an empty one gives the states that guidance steers away from."""

    def denoise(self, latents: NDArray[np.float32], timestep: float, conditioning: Conditioning) -> NDArray[np.float32]:
        """One call of the network at one timestep: latents [B, C, h, w] -> its output, of the same shape."""

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures [B, H, W, 3].

        Raises:
            NotFiniteError: the network or the decoder produced NaN or infinity.
        """

    def encode_image(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures [B, H, W, 3] of a size the model draws -> their most likely latents [B, C, h, w]."""

    def warm_ups(self, most: int) -> tuple[int, ...]:
        """How many pictures to draw, call by call, until no call of at most `most` has anything to prepare."""


@runtime_checkable
class EndToEndEngine(Engine, Protocol):
    """An engine that also goes from prompts to pictures by itself, so that nothing leaves the device in between."""

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Draw B pictures.

        Raises:
            NotEnoughMemoryError: they do not fit; the engine works on for the next request.
            NotFiniteError: the model produced NaN or infinity.
        """


@dataclass(frozen=True)
class TorchOptions:
    """How torch computes where it is to be fast. The defaults are the fast ones that change no picture.

    Attributes:
        graphs: replay a CUDA graph for each batch size, image size and number of steps, in place of thousands of calls.
        channels_last: keep images as [H, W, C] in memory, which convolutions on GPUs read best, while CUDA's group norm
            copies them to the other layout and back unless it is compiled; None does on a GPU where all is compiled.
        fuse: compute an attention's q, k and v as one product; None does on a GPU.
        compile: "none"; "regional", each kind of block once, about a minute; "whole", minutes, cached between starts.
        quantize: "none"; "int8" or "fp8", the UNet's larger linear layers by torchao. Changes pictures a little.
        attention: torch's kernel, by its name in `onestill.engine.torch.compiling.ATTENTIONS`; None lets torch choose.
        cudnn_benchmark: let cuDNN measure its ways to compute each convolution when a shape is first drawn, in place of
            guessing; in the whole process while this model draws.
    """

    graphs: bool = True
    channels_last: bool | None = None
    fuse: bool | None = None
    compile: str = "none"
    quantize: str = "none"
    attention: str | None = None
    cudnn_benchmark: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """All that B pictures are made from, for an `EndToEndEngine`.

    Attributes:
        prompts: B of them.
        negatives: B prompts that guidance steers away from; None where guidance is off. None as an entry stands for the
            zeros of `ModelInfo.zero_negative`.
        noise: [N, B, C, h, w] float32, the noise to start from and then what the sampler adds, in order.
        start: [1, C, h, w] float32, latents of an image to start from; None to start from noise alone.
        time_ids: [B, 6] float32 as in `Conditioning`, or None.
        sampler: a name in `onestill.sampling.SAMPLERS`.
        timesteps: falling, each one call of the network.
        guidance_scale: used where `negatives` are given, and by networks that take it as an input (LCM's).
        mask: [1, 1, h, w] float32, 1 where to draw and 0 where to keep `start`; None to draw everywhere.
    """

    prompts: Sequence[str]
    negatives: Sequence[str | None] | None
    noise: NDArray[np.float32]
    start: NDArray[np.float32] | None
    time_ids: NDArray[np.float32] | None
    sampler: str
    timesteps: tuple[int, ...]
    guidance_scale: float
    mask: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class GenerationResult:
    """What a request became: pictures [B, H, W, 3], what did not fit of each prompt, and the time of each stage."""

    pictures: NDArray[np.uint8]
    tokens_cut: tuple[int, ...]
    words_cut: tuple[str, ...]
    encode_ms: float
    denoise_ms: float
    decode_ms: float

    @classmethod
    def joined(cls, some: Sequence[GenerationResult]) -> GenerationResult:
        """Several as one, their times summed."""
        return cls(
            np.concatenate([one.pictures for one in some]),
            tuple(cut for one in some for cut in one.tokens_cut),
            tuple(words for one in some for words in one.words_cut),
            sum(one.encode_ms for one in some),
            sum(one.denoise_ms for one in some),
            sum(one.decode_ms for one in some),
        )


def first_latents(info: ModelInfo, timestep: int, noise: Array, start: Array | None) -> Array:
    """What sampling starts from: the noise of its first timestep, over the latents of an image where there are some.

    Args:
        info: the model.
        timestep: the first.
        noise: N(0, 1), [B, C, h, w], NumPy or torch.
        start: [1, C, h, w], or None.
    """
    if start is None and info.unit_noise:
        return noise
    alpha, sigma = info.schedule.at(timestep)
    return add_noise(0.0 if start is None else start, noise, alpha, sigma)


def batch_sizes(most: int) -> tuple[int, ...]:
    """The batch sizes that engines prepare for: 1, 2, 4 and so on below `most`, and `most` itself."""
    return *(2**power for power in range(most.bit_length()) if 2**power < most), most
