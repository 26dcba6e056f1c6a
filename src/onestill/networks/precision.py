"""Where half precision is not enough: the last convolution of networks that predict noise. `[torch]`

At timestep 999 of Stable Diffusion's schedule an error in the predicted noise is 14.6 times as large in x0. Rounding
the output to bfloat16 alone puts noise of .0245 rms into x0 there (to float16, .003); for networks that predict v or x0
nothing is magnified. The convolution that makes the output is a thousandth of the work, so it is done in float32. What
the layers before it round stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from onestill.schedule import PredictionType

__all__ = ["Float32Conv2d", "exact_output"]


class Float32Conv2d(nn.Conv2d):
    """A convolution of any type that computes in float32 and gives float32, under autocast too.

    TF32, in which GPUs may do that, holds bfloat16's and float16's inputs and weights exactly, and sums in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] of any float type -> [B, D, h, w] float32."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(input.device.type, enabled=False):
            found: Tensor = self._conv_forward(input.float(), self.weight.float(), bias)
            return found


def exact_output(unet: Any, prediction_type: PredictionType) -> None:
    """Have a UNet give its output in float32, in place, where `prediction_type` is "epsilon"; else leave it as it is.

    Parameters keep their names and types; a UNet that computes in float32 computes what it did. A network without a
    plain last convolution `conv_out`, as an adapted or an unknown one, is left as it is too.
    """
    last = getattr(unet, "conv_out", None)
    if prediction_type == "epsilon" and type(last) is nn.Conv2d:
        last.__class__ = Float32Conv2d
