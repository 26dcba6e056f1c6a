"""A convolutional network as a frozen feature network: features at its named stages, from fine to coarse.

Projected GAN (Sauer et al. 2021, arXiv 2111.01007) found that a discriminator learns many times faster through the
stages of a small classifier, EfficientNet-lite0 best of all. That network is written out here, as `transformers` does
not have it; any other comes from there.

Shapes: B batch, H W pixels, N tokens, D feature width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from onestill.errors import CheckpointError
from onestill.train.discriminator.features import on_grid

LITE0 = "efficientnet-lite0"
# (expansion, width, blocks, stride of the first, kernel) of each stage; Tan and Le 2019, the lite form of B0.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm, and ReLU6 unless `linear`; padded as TensorFlow does, to the right."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(after, eps=1e-3)
        excess = kernel - stride
        self.pad = (excess // 2, excess - excess // 2) * 2
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(F.pad(x, self.pad)))
        return x if self.linear else F.relu6(x)


class Block(nn.Module):
    """An inverted residual: widen, look around, narrow."""

    def __init__(self, before: int, after: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = before * expansion
        self.expand = ConvNorm(before, wide, 1) if expansion > 1 else nn.Identity()
        self.look = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, after, 1, linear=True)
        self.skips = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.look(self.expand(x)))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """Pictures [B, 3, H, W] in about [-1, 1] -> the last stage [B, 320, H/32, W/32]; H and W are multiples of 32.

    Its stages are `stages.0` to `stages.6`, at 1/2, 1/4, 1/8, 1/16, 1/16, 1/32 and 1/32 of the side.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2)
        width, stages = 32, []
        for expansion, after, blocks, stride, kernel in _STAGES:
            widths = [width, *[after] * blocks]
            strides = [stride, *[1] * (blocks - 1)]
            stages.append(
                nn.Sequential(*(Block(widths[i], after, expansion, strides[i], kernel) for i in range(blocks)))
            )
            width = after
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x


def open_cnn(folder: str | Path) -> nn.Module:
    """The network in `folder`, frozen: EfficientNet-lite0 where its config.json says so, else one of `transformers`.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(folder)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind == LITE0:
            network: Any = EfficientNetLite0()
            network.load_state_dict(load_file(folder / "model.safetensors"))
        else:
            network = AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} holds no whole convolutional network ({error}): give the folder of one in transformers' format, "
            "or make EfficientNet-lite0 with python -m recipes.icons.networks."
        ) from error
    frozen: nn.Module = network.eval().requires_grad_(False)
    return frozen


class CNNFeatures:
    """Features of pictures at the named stages of a convolutional network.

    Args:
        folder: see `open_cnn`.
        stages: names of its modules whose outputs are maps [B, D, h, w], such as "stages.2" of EfficientNet-lite0 or
            "encoder.stages.1" of a ResNet of `transformers`.
        size: pixels of a side that it is shown; pictures are resized to it. 0 shows them as they are.

    Raises:
        CheckpointError: there is no such network, or it has no such stage.
    """

    def __init__(self, folder: str | Path, stages: Sequence[str], size: int = 0) -> None:
        self.network, self.stages, self.size = open_cnn(folder), tuple(stages), size
        modules = dict(self.network.named_modules())
        for stage in self.stages:
            if stage not in modules:
                known = [name for name in modules if name.count(".") <= 2 and "stage" in name and name[-1].isdigit()]
                raise CheckpointError(f"{folder} has no stage '{stage}': choose cnn_stages from {', '.join(known)}.")
        self._seen: dict[str, Tensor] = {}
        for stage in self.stages:
            modules[stage].register_forward_hook(self._keep(stage))
        with torch.no_grad():
            maps = self._run(torch.zeros(1, 3, size or 64, size or 64))
        if any(state.ndim != 4 for state in maps):
            raise CheckpointError(f"a stage of {folder} gives no map [B, D, h, w]: name others in cnn_stages.")
        self.widths = tuple(state.shape[1] for state in maps)
        self.embedding_width = self.widths[-1]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> CNNFeatures:
        self.network.to(device, dtype=dtype)
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        """Pictures [B, 3, H, W] in about [-1, 1] -> tokens [B, N, D] of each stage."""
        return [on_grid(state).float() for state in self._run(x)]

    def embed(self, x: Tensor) -> Tensor:
        """The mean of the last named stage, [B, D]."""
        return self._run(x)[-1].float().mean((2, 3))

    def _keep(self, stage: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._seen[stage] = output if isinstance(output, Tensor) else output[0]

        return hook

    def _run(self, x: Tensor) -> list[Tensor]:
        if self.size and x.shape[2:] != (self.size, self.size):
            smaller = min(x.shape[2:]) >= self.size
            x = F.interpolate(x, (self.size, self.size), mode="area" if smaller else "bilinear")
        self.network(x.to(next(self.network.parameters()).dtype))
        found = [self._seen[stage] for stage in self.stages]
        self._seen.clear()
        return found
