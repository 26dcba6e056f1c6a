"""What rounding a network's output costs, and that networks which predict noise no longer pay it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onestill.checkpoint import describe
from onestill.engine.torch.eager import TorchEngine
from onestill.networks.precision import Float32Conv2d, exact_output
from onestill.schedule import NoiseSchedule, scaled_linear_alphas_cumprod
from tests.tiny_sd import tiny_sd

SCHEDULE = NoiseSchedule(scaled_linear_alphas_cumprod(), "epsilon")
ROUNDING = {torch.bfloat16: 0.0245, torch.float16: 0.0031}  # rms in x0 at 999 for noise of unit variance


def last_input(unet: nn.Module, run: Any) -> tuple[Tensor, Tensor]:
    """What the last convolution is given in a call, and what the call returns."""
    seen: list[Tensor] = []
    handle = unet.conv_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = run()
    handle.remove()
    return seen[0], found


def exactly(conv: nn.Conv2d, x: Tensor) -> Tensor:
    weight, bias = conv.weight.double(), conv.bias.double()  # type: ignore[union-attr] # it has one
    return nn.functional.conv2d(x.double(), weight, bias, padding=1)


def error_in_x0(output: Tensor, exact: Tensor) -> float:
    """Root mean square of what a wrong output puts into x0 at 999, for an output of unit variance."""
    alpha, sigma = SCHEDULE.at(999)
    wrong = (sigma / alpha) * (output.double() - exact)
    return float(wrong.square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd15", "sd15")


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_last_rounding_no_longer_reaches_x0(folder: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    unet = TorchEngine(describe(folder), device="cpu", dtype=name)._networks.unet
    assert type(unet.conv_out) is Float32Conv2d
    torch.manual_seed(0)
    x, states = torch.randn(8, 4, 8, 8), torch.randn(8, 77, 64)

    def run() -> Tensor:
        return unet(x.to(dtype), 999, states.to(dtype), return_dict=False)[0]

    with torch.inference_mode():
        hidden, output = last_input(unet, run)
        exact = exactly(unet.conv_out, hidden)
        rounded = nn.Conv2d.forward(unet.conv_out, hidden)  # as the layer was
    assert (hidden.dtype, output.dtype, rounded.dtype) == (dtype, torch.float32, dtype)
    before, after = error_in_x0(rounded, exact), error_in_x0(output, exact)
    assert before == pytest.approx(ROUNDING[dtype], rel=0.15)
    assert after < before / 300


def test_weights_keep_their_names_and_types(folder: Path) -> None:
    unet = TorchEngine(describe(folder), device="cpu", dtype="bfloat16")._networks.unet
    assert unet.conv_out.weight.dtype == torch.bfloat16
    assert set(unet.state_dict()) == set(type(unet).from_config(dict(unet.config)).state_dict())


def test_other_networks_are_left_as_they_are(folder: Path) -> None:
    info = describe(folder)
    for prediction in ("v_prediction", "sample"):
        other = dataclasses.replace(info, schedule=NoiseSchedule(info.schedule.alphas_cumprod, prediction))  # type: ignore[arg-type]
        assert type(TorchEngine(other, device="cpu", dtype="bfloat16")._networks.unet.conv_out) is nn.Conv2d
    exact_output(nn.Linear(2, 2), "epsilon")  # a network without such a layer


def test_in_float32_nothing_changes() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 4, 3, padding=1), torch.randn(2, 8, 6, 6)
    holder = nn.Module()
    holder.conv_out = conv
    expected = conv(x)
    exact_output(holder, "epsilon")
    assert torch.equal(holder.conv_out(x), expected)
