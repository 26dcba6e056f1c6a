"""The schedule's tables, timesteps and conversions: against diffusers, closed forms and each other."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from onestill.errors import OnestillError, ScheduleError, StepsError
from onestill.schedule import (
    NoiseSchedule,
    PredictionType,
    add_noise,
    cosine_alphas_cumprod,
    leading_timesteps,
    linear_alphas_cumprod,
    rescale_zero_terminal_snr,
    scaled_linear_alphas_cumprod,
    to_eps,
    to_v,
    to_x0,
    trailing_timesteps,
)

# diffusers' schedulers hand tensors to np.array, which NumPy 2 wants done otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION_TYPES: list[PredictionType] = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "config", [SCALED_LINEAR, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {}]
)
def test_tables_equal_diffusers(config: dict[str, Any], zero_snr: bool) -> None:
    scheduler = DDIMScheduler(**config, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")
    ours = NoiseSchedule.from_config(scheduler.config).alphas_cumprod
    np.testing.assert_allclose(ours, scheduler.alphas_cumprod.numpy(), rtol=0, atol=2e-6)


def test_named_tables() -> None:
    for table in (scaled_linear_alphas_cumprod(), linear_alphas_cumprod(), cosine_alphas_cumprod()):
        assert table.shape == (1000,)
        assert table.dtype == np.float64
        assert table[0] > 0.999 - 1e-4
        assert (np.diff(table) < 0).all()
    assert scaled_linear_alphas_cumprod()[-1] == pytest.approx(0.00466, abs=1e-5)  # sigma / alpha is 14.6


def test_zero_terminal_snr_ends_at_exactly_zero_and_starts_where_it_was() -> None:
    table = scaled_linear_alphas_cumprod()
    before = table.copy()
    rescaled = rescale_zero_terminal_snr(table)
    assert rescaled[-1] == 0.0
    assert rescaled[0] == pytest.approx(table[0], abs=1e-15)
    np.testing.assert_array_equal(table, before)
    np.testing.assert_allclose(rescale_zero_terminal_snr(rescaled), rescaled, atol=1e-15)


def test_alpha_sigma_snr() -> None:
    schedule = NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_alphas_cumprod()), "v_prediction")
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1.0, atol=1e-15)
    np.testing.assert_allclose(schedule.snr, (schedule.alpha / schedule.sigma) ** 2)
    assert schedule.at(999) == (0.0, 1.0)
    assert schedule.at(0) == (pytest.approx(schedule.alpha[0]), pytest.approx(schedule.sigma[0]))
    assert all(type(value) is float for value in schedule.at(500))
    assert schedule.num_train_timesteps == 1000


def test_the_table_is_a_copy_that_cannot_be_changed() -> None:
    table = scaled_linear_alphas_cumprod()
    schedule = NoiseSchedule(table)
    table[0] = 0.5
    assert schedule.alphas_cumprod[0] > 0.99
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.5


def test_timesteps_known_values() -> None:
    assert trailing_timesteps(1) == [999]
    assert trailing_timesteps(2) == [999, 499]
    assert trailing_timesteps(4) == [999, 749, 499, 249]
    assert leading_timesteps(4) == [750, 500, 250, 0]
    assert leading_timesteps(4, steps_offset=1) == [751, 501, 251, 1]


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_timesteps_equal_diffusers(spacing: str) -> None:
    scheduler = EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing=spacing, steps_offset=0)
    schedule = NoiseSchedule.from_config(scheduler.config)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        # At 61 steps, among others, diffusers' trailing spacing rounds its way to one timestep too many: -1.
        assert schedule.timesteps(steps) == scheduler.timesteps.tolist()[:steps]


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("timesteps", [trailing_timesteps, leading_timesteps])
def test_a_number_of_steps_out_of_range(timesteps: Any, steps: int) -> None:
    with pytest.raises(StepsError, match="from 1 to 1000"):
        timesteps(steps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("library", ["numpy", "torch", "torch, a timestep a sample"])
def test_conversions_invert_the_forward_process(prediction_type: PredictionType, library: str) -> None:
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 3, 4, 5, 6))  # each [B, C, h, w]
    schedule = NoiseSchedule(scaled_linear_alphas_cumprod())
    alpha: Any
    sigma: Any
    alpha, sigma = schedule.at(600)
    if library != "numpy":
        x0, eps = torch.from_numpy(x0), torch.from_numpy(eps)
    if library == "torch, a timestep a sample":
        timesteps = torch.tensor([999, 500, 1])
        alpha = torch.from_numpy(schedule.alpha)[timesteps].view(-1, 1, 1, 1)
        sigma = torch.from_numpy(schedule.sigma)[timesteps].view(-1, 1, 1, 1)
    x = add_noise(x0, eps, alpha, sigma)
    v = alpha * eps - sigma * x0
    output = {"epsilon": eps, "v_prediction": v, "sample": x0}[prediction_type]
    for convert, expected in ((to_x0, x0), (to_eps, eps), (to_v, v)):
        got = convert(output, x, alpha, sigma, prediction_type)
        assert type(got) is type(expected)
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, torch.float32, torch.bfloat16])
def test_conversions_keep_the_dtype(dtype: Any) -> None:
    schedule = NoiseSchedule(scaled_linear_alphas_cumprod(), "v_prediction")
    x = torch.ones(2, 3, dtype=dtype) if isinstance(dtype, torch.dtype) else np.ones((2, 3), dtype=dtype)
    assert schedule.x0(x, x, 500).dtype == dtype
    assert add_noise(x, x, *schedule.at(500)).dtype == dtype


def test_pure_noise_is_no_special_case_for_v_and_x0() -> None:
    noise, output = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    np.testing.assert_array_equal(to_x0(output, noise, 0.0, 1.0, "v_prediction"), -output)
    np.testing.assert_array_equal(to_eps(output, noise, 0.0, 1.0, "v_prediction"), noise)
    np.testing.assert_array_equal(to_x0(output, noise, 0.0, 1.0, "sample"), output)
    np.testing.assert_array_equal(to_v(output, noise, 0.0, 1.0, "sample"), -output)


@pytest.mark.parametrize("alpha", [0.0, np.array([0.5, 0.0]), torch.tensor([0.0, 0.5])])
@pytest.mark.parametrize("convert", [to_x0, to_v])
def test_epsilon_at_pure_noise_is_refused(convert: Any, alpha: Any) -> None:
    x = torch.zeros(2) if isinstance(alpha, torch.Tensor) else np.zeros(2)
    with pytest.raises(ScheduleError, match="zero terminal SNR"):
        convert(x, x, alpha, 1.0, "epsilon")


@pytest.mark.parametrize("convert", [to_x0, to_eps, to_v])
def test_an_unknown_prediction_type_is_refused(convert: Any) -> None:
    with pytest.raises(ScheduleError, match="must be one of epsilon, v_prediction, sample"):
        convert(1.0, 1.0, 0.5, 0.5, "velocity")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphas_cumprod": [0.5, 0.6]}, "must fall"),
        ({"alphas_cumprod": [1.0, 0.6]}, "in \\[0, 1\\)"),
        ({"alphas_cumprod": [0.5, -0.1]}, "in \\[0, 1\\)"),
        ({"alphas_cumprod": [0.5, float("nan")]}, "in \\[0, 1\\)"),
        ({"alphas_cumprod": []}, "one-dimensional"),
        ({"alphas_cumprod": [[0.5], [0.4]]}, "one-dimensional"),
        ({"alphas_cumprod": [0.5, 0.0]}, "zero terminal SNR"),
        ({"alphas_cumprod": [0.5, 0.4], "prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"alphas_cumprod": [0.5, 0.4], "timestep_spacing": "linspace"}, "trailing or leading"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        NoiseSchedule(**{**arguments, "alphas_cumprod": np.array(arguments["alphas_cumprod"])})
    assert isinstance(caught.value, OnestillError)
    assert isinstance(caught.value, ValueError)


CONFIGS = [
    {**SCALED_LINEAR, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {**SCALED_LINEAR, "timestep_spacing": "leading", "steps_offset": 1},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01},
    {"beta_schedule": "linear", "beta_end": 0.03, "prediction_type": "sample", "rescale_betas_zero_snr": True},
    {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_schedule_survives_its_config(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config)
    written = json.loads(json.dumps(schedule.to_config()))
    again = NoiseSchedule.from_config(written)
    np.testing.assert_allclose(again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-9, atol=1e-12)
    assert again.prediction_type == schedule.prediction_type
    assert again.timestep_spacing == schedule.timestep_spacing
    assert again.steps_offset == schedule.steps_offset


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_reads_the_config_the_same_way(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config)
    written = schedule.to_config()
    table = DDIMScheduler.from_config(written).alphas_cumprod.numpy()
    np.testing.assert_allclose(table, schedule.alphas_cumprod, rtol=0, atol=2e-6)
    if schedule.prediction_type != "sample":
        assert EulerAncestralDiscreteScheduler.from_config(written).config.timestep_spacing == schedule.timestep_spacing


def test_the_shipped_kind_of_schedule_is_written_by_name() -> None:
    written = NoiseSchedule(rescale_zero_terminal_snr(scaled_linear_alphas_cumprod()), "v_prediction").to_config()
    assert written == {
        **SCALED_LINEAR,
        "num_train_timesteps": 1000,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 0,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "Flow-matching"),
        ({**SCALED_LINEAR, "use_flow_sigmas": True}, "Flow-matching"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({**SCALED_LINEAR, "rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "zero terminal SNR"),
    ],
)
def test_a_config_that_cannot_be_used(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        NoiseSchedule.from_config(config)
