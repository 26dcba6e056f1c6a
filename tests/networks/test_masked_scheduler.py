"""A mask with diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onestill.networks.scheduler import DiffusersScheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def network(x: Any, timestep: float) -> Any:
    return (1.5 * x / np.sqrt(1.0 + x * x) - 0.1 * x).astype(np.float32)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"])
def test_outside_the_mask_the_image_stays(name: str) -> None:
    pytest.importorskip("scipy")
    scheduler = DiffusersScheduler({"_class_name": name, **BETAS})
    image = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    mask = np.zeros((1, 1, 8, 8), np.float32)
    mask[..., :4] = 1
    settings: dict[str, Any] = {"seeds": [1, 2], "shape": (4, 8, 8), "num_inference_steps": 4, "strength": 0.5}
    plain = scheduler.sample(network, start=image, **settings)
    inside = scheduler.sample(network, start=image, mask=mask, **settings)
    np.testing.assert_array_equal(inside[..., 4:], np.broadcast_to(image, inside.shape)[..., 4:])
    # This network sees each latent alone, so inside the mask nothing else changes.
    np.testing.assert_allclose(inside[..., :4], plain[..., :4], atol=1e-6)
    full = scheduler.sample(network, start=image, mask=np.ones_like(mask), **settings)
    np.testing.assert_allclose(full, plain, atol=1e-6)
