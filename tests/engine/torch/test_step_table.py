"""The table of a walk against the sampler that it was made from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onestill.checkpoint import ModelInfo, describe
from onestill.engine.protocol import first_latents
from onestill.engine.torch.step_table import SETTINGS, step_table
from onestill.errors import ScheduleError, StepsError
from onestill.sampling import DRAWING, SAMPLERS, sample
from onestill.schedule import NoiseSchedule, rescale_zero_terminal_snr, scaled_linear_alphas_cumprod

SHAPE = (2, 4, 3, 3)


def network(x: Any, timestep: int) -> Any:
    """An output that depends on both, and not linearly, yet does not blow small differences up from step to step."""
    return np.tanh(x) + 0.1 * np.sin(timestep / 100)


def by_table(info: ModelInfo, table: Any, noise: Any, start: Any) -> Any:
    terms = [] if start is None else [np.broadcast_to(start, SHAPE)]
    terms += list(noise)
    for row in table:
        x = sum(weight * term for weight, term in zip(row[SETTINGS:], terms, strict=False))
        terms.append(row[1] * x + row[2] * network(x, row[0]))
    return terms[-1]


@pytest.fixture(scope="module")
def info(tiny_folder: Path) -> ModelInfo:
    return describe(tiny_folder)


@pytest.mark.parametrize("has_start", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "zero terminal SNR"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_table_walks_as_its_sampler(info: ModelInfo, sampler: str, prediction: Any, has_start: bool) -> None:
    alphas = scaled_linear_alphas_cumprod()
    if prediction == "zero terminal SNR":
        alphas, prediction = rescale_zero_terminal_snr(alphas), "v_prediction"
    random = np.random.default_rng(0)
    for unit_noise in (False, True):
        info = dataclasses.replace(info, schedule=NoiseSchedule(alphas, prediction), unit_noise=unit_noise)
        for timesteps in ((999,), (499,), (999, 749, 499, 249), tuple(range(980, 0, -20))):
            noise = random.standard_normal((len(timesteps) if sampler in DRAWING else 1, *SHAPE))
            start = random.standard_normal((1, *SHAPE[1:])) if has_start else None
            table = step_table(info, sampler, timesteps, len(noise), has_start)
            assert table.shape == (len(timesteps), SETTINGS + has_start + len(noise) + len(timesteps))
            assert table.dtype == np.float32
            draws = iter(noise)
            x = first_latents(info, timesteps[0], next(draws), start)

            def predict_x0(x: Any, timestep: int, info: ModelInfo = info) -> Any:
                return info.schedule.x0(network(x, timestep), x, timestep)

            expected = sample(sampler, predict_x0, x, info.schedule, timesteps, lambda step: next(draws))  # noqa: B023
            found = by_table(info, table.astype(np.float64), noise, start)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_one_call_starts_from_the_noise_itself(info: ModelInfo) -> None:
    info = dataclasses.replace(info, unit_noise=True)
    assert step_table(info, "euler", (999,), 1, False)[0, [0, SETTINGS, SETTINGS + 1]].tolist() == [999, 1, 0]


def test_what_cannot_be_walked_is_said(info: ModelInfo) -> None:
    with pytest.raises(ScheduleError, match="No sampler"):
        step_table(info, "eul", (999,), 1, False)
    with pytest.raises(StepsError, match="must fall"):
        step_table(info, "euler", (499, 999), 1, False)
