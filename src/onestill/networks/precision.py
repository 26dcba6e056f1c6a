"""Where half precision is not enough: the last convolution of networks that predict noise. `[torch]`

At timestep 999 of Stable Diffusion's schedule an error in the predicted noise becomes 14.6 times as large in x0. There,
rounding the output to bfloat16 by itself puts an error of .0245 rms into x0 (to float16, .003). For networks that
predict v or x0 nothing is magnified. The convolution that makes the output is a thousandth of the work, so it computes
in float32. The rounding in the layers before it remains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onestill.schedule import PredictionType

__all__ = ["Float32Conv2d", "exact_output"]


class Float32Conv2d(nn.Conv2d):
    """A convolution of any type that computes in float32 and gives float32, under autocast too.

    GPUs may do this in TF32, which holds inputs and weights of bfloat16 and float16 exactly, and sums in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] of any float type -> [B, D, h, w] float32."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(input.device.type, enabled=False):
            found: Tensor = self._conv_forward(input.float(), self.weight.float(), bias)
            return found


def exact_output(unet: Any, prediction_type: PredictionType) -> None:
    """Make a UNet return float32, in place, if `prediction_type` is "epsilon"; otherwise leave it unchanged.

    Parameters keep their names and types, and the output of a UNet in float32 does not change. A network without a
    plain last convolution `conv_out`, such as one with a LoRA on it, is left unchanged too.
    """
    last = getattr(unet, "conv_out", None)
    if prediction_type == "epsilon" and type(last) is nn.Conv2d:
        last.__class__ = Float32Conv2d
