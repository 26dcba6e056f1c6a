"""Networks of a real model's size with random weights, made where they are needed: nothing is read from a disk.

Ours and diffusers' pipelines take copies of the same ones, so that they draw the same pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

import onestill.engine.torch.eager as torch_engine
from onestill.bench.setting import Setting
from onestill.engine.protocol import TorchOptions
from onestill.networks.libraries import quiet_libraries
from onestill.networks.load import DTYPES
from onestill.networks.random_weights import CLASSES, CONFIGS, meta_module, random_model, weight_scale
from onestill.pipeline import Pipeline, load

__all__ = ["SMALL", "RandomNetworks"]

# The same architecture, small: what a rehearsal measures, and what correctness is checked on.
_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 64}
_TINY_VAE = {f"{part}_block_out_channels": [8] * 4 for part in ("encoder", "decoder")}
_TINY_VAE |= {f"num_{part}_blocks": [1] * 4 for part in ("encoder", "decoder")}
SMALL: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        **CONFIGS["sdxl"]["unet"],
        "sample_size": 8,
        "block_out_channels": [64, 128, 128],
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 1],
        "cross_attention_dim": 128,
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
    },
    "vae": {**CONFIGS["sdxl"]["vae"], "block_out_channels": [32] * 4, "layers_per_block": 1},
    **{name: {**CONFIGS["sdxl"][name], **_TEXT, "projection_dim": 64} for name in ("text_encoder", "text_encoder_2")},
    "tiny_vae": _TINY_VAE,
}


class RandomNetworks:
    """A model's networks on one device.

    Args:
        folder: a new folder for its configs and tokenizers.
        device: as torch names it.
        configs: other sizes than SDXL's, as in `CONFIGS`.
        dtype: what they are made in, and what each has been rounded to once.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        configs: Mapping[str, Mapping[str, Any]] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.device = device
        self.folder = random_model("sdxl", folder, configs, filled=False)
        self.tiny_vae = str(folder / "tiny_vae")
        generator = torch.Generator(device).manual_seed(0)
        chosen = configs or CONFIGS["sdxl"]
        self.parts = {name: made(CLASSES[name], config, device, dtype, generator) for name, config in chosen.items()}

    def on(self, device: str) -> RandomNetworks:
        """The same networks on another device."""
        other = copy.copy(self)
        other.device = device
        other.parts = {name: copy.deepcopy(part).to(device) for name, part in self.parts.items()}
        return other

    def pipeline(self, setting: Setting) -> Pipeline:
        """Ours, with copies of the networks, as a setting asks for it."""
        with self._in_place_of_files(setting):
            return load(
                self.folder,
                engine="torch",
                device=self.device,
                dtype=setting.dtype,
                tiny_vae=setting.tiny_vae,
                options=None if setting.options is None else TorchOptions(**setting.options),
            )

    def diffusers_pipeline(self, setting: Setting) -> Any:
        """diffusers' own, with copies of the networks, on the device."""
        dtype = DTYPES[str(setting.dtype)]
        parts = {name: cast(copy.deepcopy(part), dtype) for name, part in self.parts.items() if name != "tiny_vae"}
        if setting.tiny_vae is not None:
            parts["vae"] = cast(copy.deepcopy(self.parts["tiny_vae"]), dtype)
        with quiet_libraries():
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(self.folder), torch_dtype=dtype, local_files_only=True, **parts
            )
        return pipe.to(self.device)

    @contextmanager
    def _in_place_of_files(self, setting: Setting) -> Iterator[None]:
        """What the engine would read from the disk are copies of the networks while this lasts."""
        names = [name for name in self.parts if name != "tiny_vae" or setting.tiny_vae is not None]
        reads = torch_engine.load_components

        def copies(info: Any, dtype: str = "float32", only: Any = None) -> dict[str, Any]:
            del info
            return {name: self._copy(name, dtype) for name in names if only is None or name in only}

        torch_engine.load_components = copies
        try:
            yield
        finally:
            torch_engine.load_components = reads

    def _copy(self, name: str, dtype: str) -> Any:
        """As `load_components` casts: what would overflow in float16 stays in float32."""
        module = copy.deepcopy(self.parts[name])
        is_wide = name == "vae" and dtype == "float16" and module.config.force_upcast
        return cast(module, torch.float32 if is_wide else DTYPES[dtype])


def cast(module: Any, dtype: torch.dtype) -> Any:
    """A module in another type, in place. diffusers' own `to` warns of modules to keep in float32 where none are."""
    return torch.nn.Module.to(module, dtype=dtype)


@torch.no_grad()
def made(kind: str, config: Mapping[str, Any], device: str, dtype: torch.dtype, generator: torch.Generator) -> Any:
    """A network with weights drawn on its device, by the rule of `random_model`."""
    module = cast(meta_module(kind, config), dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:  # norms' weights are 1, biases 0
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            parameter.normal_(0.0, weight_scale(name, tuple(parameter.shape)), generator=generator)
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):
            raise RuntimeError(f"{kind} has a buffer '{name}', which is not known how to fill.")
        buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
    return module.eval().requires_grad_(False)
