"""The engine for machines with torch: the same folder through diffusers' and transformers' own classes. `[torch]`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo, weights_file
from onestill.engine import Conditioning, local, to_images, to_pictures
from onestill.engine.text import PromptTokenizer
from onestill.errors import CheckpointError, OnestillError

__all__ = ["TorchEngine", "load_components", "most_likely_latents", "quiet_libraries"]

# Only these are ever made from a name in a file, each by its own class; nothing in a model's folder is run.
CLASSES = {
    "text_encoder": {"BertModel": transformers.BertModel, "CLIPTextModel": transformers.CLIPTextModel},
    "unet": {"UNet2DConditionModel": diffusers.UNet2DConditionModel},
    "vae": {"AutoencoderKL": diffusers.AutoencoderKL, "AutoencoderTiny": diffusers.AutoencoderTiny},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOGETHER = 8  # images to a call, which bounds memory


class TorchEngine:
    """A model on torch. See `onestill.engine.Engine`.

    Args:
        info: the model.
        device: as torch names it; None is "cpu".
        dtype: one of `DTYPES`; None is float32 on a CPU and float16 elsewhere.
        threads: how many CPU threads torch uses, in the whole process; None leaves them as they are.

    Raises:
        OnestillError: there is no such device or dtype.
        CheckpointError: the weights do not fit the configs, or are of a class that is not supported.
    """

    name = "torch"

    def __init__(
        self, info: ModelInfo, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        self.info = info
        self.device = device or "cpu"
        self.dtype = dtype or ("float32" if self.device == "cpu" else "float16")
        if self.dtype not in DTYPES:
            raise OnestillError(f"The engine 'torch' computes in {', '.join(DTYPES)}, not '{self.dtype}'.")
        try:
            self._device = torch.device(self.device)
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise OnestillError(f"torch has no device '{self.device}' here; use 'cpu'.") from error
        if threads is not None:
            torch.set_num_threads(threads)
        self._tokenize = PromptTokenizer(info)
        parts = load_components(info, self.dtype)
        self._text_encoder = parts["text_encoder"].to(self._device)
        self._unet = parts["unet"].to(self._device)
        self._vae = parts["vae"].to(self._device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts."""
        tokens = self._tokenize(prompts)
        states = []
        with torch.inference_mode():
            for start in range(0, len(prompts), TOGETHER):
                ids = torch.from_numpy(tokens.ids[start : start + TOGETHER]).to(self._device)
                mask = torch.from_numpy(tokens.mask[start : start + TOGETHER]).to(self._device)
                # diffusers' pipeline passes the mask only where the text encoder's config asks for it.
                states.append(self._text_encoder(ids, attention_mask=mask if self.info.use_attention_mask else None)[0])
        return Conditioning(states=_to_numpy(torch.cat(states)), tokens_cut=tokens.cut)

    def denoise(self, latents: NDArray[np.float32], timestep: int, conditioning: Conditioning) -> NDArray[np.float32]:
        """Latents [B, C, h, w] -> the network's output, of the same shape."""
        outputs = []
        with torch.inference_mode():
            for start in range(0, len(latents), TOGETHER):
                x = self._to_torch(latents[start : start + TOGETHER], self._unet.dtype)
                states = self._to_torch(conditioning.states[start : start + TOGETHER], self._unet.dtype)
                outputs.append(self._unet(x, timestep, states, return_dict=False)[0])
        return _to_numpy(torch.cat(outputs))

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Latents [B, C, h, w] -> pictures [B, H, W, 3]."""
        pictures = []
        with torch.inference_mode():
            for start in range(0, len(latents), TOGETHER):
                z = self._to_torch(latents[start : start + TOGETHER] / self.info.scaling_factor, self._vae.dtype)
                pictures.append(to_pictures(_to_numpy(self._vae.decode(z, return_dict=False)[0])))
        return np.concatenate(pictures)

    def encode_image(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures [B, H, W, 3] -> latents [B, C, h, w]."""
        latents = []
        with torch.inference_mode():
            for start in range(0, len(pictures), TOGETHER):
                image = self._to_torch(to_images(pictures[start : start + TOGETHER]), self._vae.dtype)
                latents.append(most_likely_latents(self._vae, image) * self.info.scaling_factor)
        return _to_numpy(torch.cat(latents))

    def _to_torch(self, array: NDArray[np.float32], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, dtype)


def most_likely_latents(vae: Any, image: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents for images [B, 3, H, W]: the mode, where it gives a distribution."""
    encoded = vae.encode(image)
    latents: torch.Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents


def load_components(info: ModelInfo, dtype: str = "float32") -> dict[str, Any]:
    """The text encoder, UNet and autoencoder of a model as torch modules, in evaluation mode on the CPU.

    Raises:
        CheckpointError: the weights do not fit the configs, or a class is not supported.
    """
    parts = {}
    for component, classes in CLASSES.items():
        wanted = info.classes.get(component, ("", ""))[1]
        if wanted not in classes:
            raise CheckpointError(f"'{info.path}' has a {component} of class '{wanted}'; known: {', '.join(classes)}.")
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        if ".fp16." in weights_file(info.path, component).name:
            options["variant"] = "fp16"
        options["dtype" if component == "text_encoder" else "torch_dtype"] = DTYPES[dtype]
        try:
            with quiet_libraries():
                module = classes[wanted].from_pretrained(local(info.path / component), **options)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"The weights in '{info.path / component}' do not fit its config ({_first_line(error)}); copy it again."
            ) from error
        if component == "vae" and dtype == "float16" and module.config.force_upcast:
            module = module.float()  # its activations leave float16's range
        parts[component] = module.eval().requires_grad_(False)
    return parts


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Run the body without the advice and progress bars of diffusers and transformers. Their errors still raise."""
    loggings = (diffusers.utils.logging, transformers.utils.logging)
    before = [(one.get_verbosity(), one.is_progress_bar_enabled()) for one in loggings]
    try:
        for one in loggings:
            one.set_verbosity_error()
            one.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, (verbosity, bars) in zip(loggings, before, strict=True):
            one.set_verbosity(verbosity)
            if bars:
                one.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.float().cpu().numpy()
    return found
