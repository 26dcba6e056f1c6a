"""A model's torch networks -> OpenVINO's graphs, the same for every form. Needs `[torch]`.

The UNet is two graphs. `time` makes one vector of the timestep and, for SDXL, of the pooled prompt and the sizes. It is
always in float32: to bfloat16, timestep 999 is 1000. `unet` takes its output.

Shapes: B batch, K tokens, P width of a pooled prompt, E of the timestep's embedding, h w latent size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from onestill.engine.openvino.runtime import openvino

import torch

from onestill.checkpoint import ModelInfo
from onestill.engine.openvino.private_api import fuse, keep_half_precision, trace
from onestill.networks.latents import most_likely_latents
from onestill.networks.libraries import quiet_libraries

Examples = Mapping[str, torch.Tensor]


class _TextEncoder(torch.nn.Module):
    """What `onestill.networks.inference.Networks.states` takes of a text encoder."""

    def __init__(self, module: Any, *, is_xl: bool) -> None:
        super().__init__()
        self.module, self.is_xl = module, is_xl

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        found = self.module(input_ids, attention_mask=attention_mask, output_hidden_states=self.is_xl)
        if not self.is_xl:
            return found[0]
        pooled = getattr(found, "text_embeds", None)
        return found.hidden_states[-2] if pooled is None else (found.hidden_states[-2], pooled)


class _Time(torch.nn.Module):
    """A timestep [1], and for SDXL pooled prompts [B, P] and sizes [B, 6] -> one vector [B, E]."""

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


class _UNet(torch.nn.Module):
    """The UNet from the vector of `_Time` on."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.module = copy.copy(unet)  # without its weights, which both graphs read
        self.module._modules = dict(unet._modules) | {"time_embedding": _Given()}
        self.module.get_time_embed = lambda sample, timestep: timestep
        self.module.get_aug_embed = lambda **_: None

    def forward(self, sample: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        return self.module(sample, time, encoder_hidden_states, return_dict=False)[0]


class _Given(torch.nn.Module):
    def forward(self, given: torch.Tensor, condition: None = None) -> torch.Tensor:
        return given


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

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return most_likely_latents(self.module, image)


def wrapped(part: str, module: Any, info: ModelInfo) -> torch.nn.Module:
    """The function of tensors that becomes the graph `part`, of a network that has it."""
    match part:
        case "time":
            return copy.deepcopy(_Time(module)).float()
        case "unet":
            return _UNet(module)
        case "decoder":
            return _Decoder(module)
        case "encoder":
            return _Encoder(module)
    return _TextEncoder(module, is_xl=info.is_xl)


def example_inputs(part: str, module: Any, info: ModelInfo, batch: int, latent_size: tuple[int, int]) -> Examples:
    """Inputs to trace `wrapped` with, for images of a latent size (h, w)."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    latents = (batch, info.latent_shape[0], *latent_size)
    match part:
        case "time":
            timestep = {"timestep": torch.tensor([999.0])}
            if not info.is_xl:
                return timestep
            pooled = module.config.projection_class_embeddings_input_dim - 6 * module.config.addition_time_embed_dim
            return timestep | {"pooled": noise(1, pooled), "time_ids": torch.full((1, 6), 512.0)}
        case "unet":
            return {
                "sample": noise(*latents),
                "time": noise(1, module.time_embedding.linear_2.out_features),
                "encoder_hidden_states": noise(batch, info.max_tokens, module.config.cross_attention_dim),
            }
        case "decoder":
            return {"latents": noise(*latents)}
        case "encoder":
            height, width = (side * info.vae_scale_factor for side in latent_size)
            return {"image": torch.rand(batch, 3, height, width, generator=generator) * 2 - 1}
    ids = {"input_ids": torch.ones(batch, info.max_tokens, dtype=torch.long)}
    return ids | ({"attention_mask": torch.ones_like(ids["input_ids"])} if info.use_attention_mask else {})


def convert(module: torch.nn.Module, examples: Examples, free_axes: Mapping[str, tuple[int, ...]]) -> Any:
    """A torch module as OpenVINO's model, with the fusions that OpenVINO's own converter makes.

    Args:
        module: as `wrapped` gives it.
        examples: as `example_inputs` gives them; their sizes are the graph's, but for `free_axes`.
        free_axes: an input's name -> the axes that may have any size.
    """
    module = module.eval()
    if any(parameter.dtype == torch.float16 for parameter in module.parameters()):
        keep_half_precision(module)
    # The tracer warns of every Python branch that it passes; callers check what the graphs compute instead.
    with torch.no_grad(), quiet_libraries():
        model = trace(module, examples)
    shapes = {
        name: openvino.PartialShape([-1 if i in free_axes.get(name, ()) else n for i, n in enumerate(value.shape)])
        for name, value in examples.items()
    }
    model.reshape(shapes)
    fuse(model)
    return model
