"""The eager engine on torch, one network call after the other: the reference that faster engines must agree with.

It draws real checkpoints of every kind, on any device, through diffusers' and transformers' own classes. `[torch]`
"""

from __future__ import annotations

from collections.abc import Sequence, Sized

import numpy as np
import torch
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo
from onestill.engine.device import choose, default_dtype
from onestill.engine.memory import check_memory, explain_oom
from onestill.engine.protocol import Conditioning, batch_sizes
from onestill.errors import NotFiniteError, OnestillError
from onestill.networks.inference import Networks
from onestill.networks.latents import to_uint8
from onestill.networks.load import DTYPES, load_components
from onestill.networks.precision import exact_output
from onestill.pixels import to_images
from onestill.text.tokenize import PromptTokenizer, Tokens

MOST_BATCH = 8  # images to a call, which bounds memory


class TorchEngine:
    """A model on torch. See `onestill.engine.protocol.Engine`.

    Args:
        info: the model.
        device: as `onestill.engine.device.choose` takes it; None and "auto" are a GPU where torch has one.
        dtype: one of `DTYPES`; None is float32 on a CPU and float16 elsewhere.
        threads: how many CPU threads torch uses, in the whole process; None leaves them as they are.

    Raises:
        OnestillError: there is no such dtype, or the device cannot be had; the sentence says why.
        CheckpointError: the weights do not fit the configs, or are of a class that is not supported.
        NotEnoughMemoryError: the weights do not fit into memory.
    """

    name = "torch"

    def __init__(
        self, info: ModelInfo, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        self.info = info
        self.device = choose(device)
        self.dtype = dtype or default_dtype(self.device)
        if self.dtype not in DTYPES:
            raise OnestillError(f"The engine 'torch' computes in {', '.join(DTYPES)}, not '{self.dtype}'.")
        self._device = torch.device(self.device)
        if threads is not None:
            torch.set_num_threads(threads)
        tokenizers = [PromptTokenizer(info, component) for component in info.tokenizers]
        check_memory(info, self.dtype)
        parts = load_components(info, self.dtype)
        if parts["vae"].dtype != DTYPES[self.dtype] and _has_bfloat16(self._device):
            parts["vae"] = parts["vae"].to(torch.bfloat16)  # its range is float32's, at half the time
        exact_output(parts["unet"], info.schedule.prediction_type)
        with explain_oom(self._device, "hold the model"):
            parts = {name: part.to(self._device) for name, part in parts.items()}
        self._networks = Networks(info, parts, tokenizers)

    def warm_ups(self, most: int) -> tuple[int, ...]:
        """See `onestill.engine.protocol.Engine`."""
        return batch_sizes(min(most, MOST_BATCH))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts."""
        encoder = self._networks.text_encoder
        tokens = encoder.tokenize(prompts)
        with torch.inference_mode(), explain_oom(self._device, f"encode {len(prompts)} prompts"):
            found = [encoder.states(*self._inputs(tokens, part)) for part in _batches(prompts)]
            states = np.concatenate([_to_numpy(states) for states, _ in found])
            pooled = [_to_numpy(pooled) for _, pooled in found if pooled is not None]
        return Conditioning(states, tokens[0].cut, tokens[0].words_cut, np.concatenate(pooled) if pooled else None)

    def _inputs(self, tokens: Sequence[Tokens], part: slice) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        ids = [torch.from_numpy(one.ids[part]).to(self._device) for one in tokens]
        # diffusers' pipeline passes the mask only where the text encoder's config asks for it.
        mask = torch.from_numpy(tokens[0].mask[part]).to(self._device) if self.info.use_attention_mask else None
        return ids, mask

    def denoise(self, latents: NDArray[np.float32], timestep: float, conditioning: Conditioning) -> NDArray[np.float32]:
        """Latents [B, C, h, w] -> the network's output, of the same shape."""
        outputs = []
        with torch.inference_mode(), explain_oom(self._device, self._drawing(latents)):
            for part in _batches(latents):
                given = conditioning[part]
                x = self._to_torch(latents[part], self._networks.dtype)
                states, pooled = self._to_torch(given.states, self._networks.dtype), self._optional(given.pooled)
                # Sizes in pixels stay in float32: to bfloat16, 999 is 1000.
                time_ids = None if given.time_ids is None else self._to_torch(given.time_ids, torch.float32)
                output = self._networks.output(x, timestep, states, pooled, time_ids, given.guidance_scale)
                outputs.append(_to_numpy(output))
        return np.concatenate(outputs)

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures [B, H, W, 3]."""
        pictures = []
        with torch.inference_mode(), explain_oom(self._device, self._drawing(latents)):
            for part in _batches(latents):
                pictures.append(self._checked_pictures(self._to_torch(latents[part], torch.float32)))
        return np.concatenate(pictures)

    def _checked_pictures(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        try:
            pictures: NDArray[np.uint8] = to_uint8(self._networks.latent_space.checked_decode(latents)).cpu().numpy()
        except FloatingPointError as error:
            raise NotFiniteError.of(str(error), self.dtype) from None
        return pictures

    def encode_image(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures [B, H, W, 3] -> latents [B, C, h, w]."""
        latents, space = [], self._networks.latent_space
        with torch.inference_mode(), explain_oom(self._device, "encode the picture"):
            for part in _batches(pictures):
                encoded = space.encode(self._to_torch(to_images(pictures[part]), torch.float32))
                # Rounded to the autoencoder's type, as diffusers' pipelines scale the latents in it.
                latents.append(_to_numpy(encoded.to(space.autoencoder.dtype)))
        return np.concatenate(latents)

    def _drawing(self, latents: NDArray[np.float32]) -> str:
        """The work that an out-of-memory error names, for latents [B, C, h, w]."""
        height, width = (side * self.info.vae_scale_factor for side in latents.shape[2:])
        return f"draw {len(latents)} pictures of {width}x{height}"

    def _optional(self, array: NDArray[np.float32] | None) -> torch.Tensor | None:
        return None if array is None else self._to_torch(array, self._networks.dtype)

    def _to_torch(self, array: NDArray[np.float32], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, dtype)


def _batches(items: Sized) -> list[slice]:
    return [slice(start, start + MOST_BATCH) for start in range(0, len(items), MOST_BATCH)]


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.float().cpu().numpy()
    return found
