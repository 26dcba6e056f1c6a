from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from onestill.errors import CheckpointError
from onestill.networks.condition import Condition
from onestill.networks.denoiser import (
    Denoiser,
    guidance_embedding,
    load_unet,
    read_schedule,
    training_schedule,
    unet_folder,
)
from onestill.networks.libraries import quiet_libraries
from onestill.sampling import sample_consistency
from tests.train.models import PREDICTION, SIDE, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in PREDICTION:
        write_model(folder / family, family)
    return folder


def said(count: int, width: int = 16, seed: int = 0) -> Condition:
    text = torch.randn(count, 4, width, generator=torch.Generator().manual_seed(seed))
    return Condition(text, torch.ones(count, 4, dtype=torch.bool))


def test_a_model_brings_its_schedule_and_draws_from_pure_noise(models: Path) -> None:
    for family, prediction in PREDICTION.items():
        for source in (models / family, models / family / "unet"):
            schedule = read_schedule(source)
            assert schedule.prediction_type == prediction
            assert schedule.timesteps(4) == [999, 749, 499, 249]
            assert schedule.alpha[999] == pytest.approx(0.0683, abs=1e-4)
            assert unet_folder(source) == models / family / "unet"


def test_a_unet_by_itself_is_ours(models: Path, tmp_path: Path) -> None:
    load_unet(models / "sd15").save_pretrained(tmp_path / "unet")
    assert read_schedule(tmp_path / "unet").alpha[999] == training_schedule().alpha[999] == 0


def test_an_eps_model_on_zero_terminal_snr_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    }
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="epsilon prediction says nothing"):
        read_schedule(tmp_path / "unet")


def test_guidance_of_one_asks_once_and_others_lie_on_the_line(models: Path) -> None:
    denoiser = Denoiser(load_unet(models / "sd15").eval(), read_schedule(models / "sd15"))
    x, t, told, empty = torch.randn(2, 4, SIDE, SIDE), torch.tensor([900, 300]), said(2), said(1, seed=1)
    with torch.no_grad():
        cond, uncond = denoiser.x0(x, t, told), denoiser.x0(x, t, empty.expand(2))
        assert torch.equal(denoiser.guided_x0(x, t, told, empty, 1.0), cond)
        expected = uncond + 3 * (cond - uncond)
        torch.testing.assert_close(denoiser.guided_x0(x, t, told, empty, 3.0), expected, rtol=1e-4, atol=1e-3)
        each = torch.tensor([1.0, 3.0]).view(-1, 1, 1, 1)
        made = denoiser.guided_x0(x, t, told, empty, each)
        torch.testing.assert_close(made, torch.stack([cond[0], expected[1]]), rtol=1e-4, atol=1e-3)


def test_x0_and_eps_are_one_statement(models: Path) -> None:
    for family in ("sd15", "sd21"):
        denoiser = Denoiser(load_unet(models / family).eval(), read_schedule(models / family))
        x, t, told = torch.randn(2, 4, SIDE, SIDE), torch.tensor([900, 300]), said(2)
        alpha, sigma = denoiser.signal(t)
        with torch.no_grad():
            torch.testing.assert_close(alpha * denoiser.x0(x, t, told) + sigma * denoiser.eps(x, t, told), x)


def test_the_sampler_may_be_named(models: Path) -> None:
    denoiser = Denoiser(load_unet(models / "sd21").eval(), read_schedule(models / "sd21"))
    told = said(1)
    made = denoiser.sample(told, said(1, seed=1), (4, SIDE, SIDE), 2, seed=5, sampler="consistency")
    generator = torch.Generator().manual_seed(5)

    def draw(_step: int) -> torch.Tensor:
        return torch.randn(1, 4, SIDE, SIDE, generator=generator)

    def predict_x0(x: torch.Tensor, timestep: int) -> torch.Tensor:
        return denoiser.x0(x, torch.tensor([timestep]), told)

    with torch.no_grad():
        expected = sample_consistency(predict_x0, draw(0), denoiser.schedule, [999, 499], draw)
    torch.testing.assert_close(made, expected)


def test_noise_is_predicted_in_float32_under_autocast(models: Path) -> None:
    """Rounding a predicted noise to bfloat16 alone puts .0245 rms into x0 at 999."""
    torch.manual_seed(0)
    x, t, told = torch.randn(8, 4, SIDE, SIDE), torch.full((8,), 999), said(8)
    for family, is_exact in (("sd15", True), ("sd21", False)):
        unet = load_unet(models / family).eval()
        denoiser = Denoiser(unet, read_schedule(models / family))
        hidden: list[torch.Tensor] = []
        unet.conv_out.register_forward_pre_hook(lambda _, inputs, hidden=hidden: hidden.append(inputs[0]))
        with torch.autocast("cpu", torch.bfloat16):
            output = denoiser.output(x, t, told)
        output.square().mean().backward()
        assert unet.conv_out.weight.grad is not None
        assert unet.conv_in.weight.grad.abs().sum() > 0
        with torch.no_grad():
            weight, bias = unet.conv_out.weight.double(), unet.conv_out.bias.double()
            exact = torch.nn.functional.conv2d(hidden[0].double(), weight, bias, padding=1)
        alpha, sigma = denoiser.schedule.at(999)
        wrong = (sigma / alpha) * (output - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert wrong < 1e-4 if is_exact else wrong > 0.01


def test_guidance_is_embedded_as_diffusers_does(models: Path) -> None:
    with quiet_libraries():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(models / "sd15")
    w = torch.tensor([1.0, 3.5, 15.0])
    expected = pipeline.get_guidance_scale_embedding(w - 1, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w, 256, torch.device("cpu")), expected, rtol=1e-4, atol=2e-3)
    one = guidance_embedding(3.5, 256, torch.device("cpu"))
    torch.testing.assert_close(one, expected[1:2], rtol=1e-4, atol=2e-3)
    assert torch.equal(guidance_embedding(torch.tensor(3.5), 256, torch.device("cpu")), one)
