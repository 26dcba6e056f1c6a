"""A sampler's walk as a table of numbers, so that what is captured or compiled for one walk serves others too.

Every sampler of `onestill.sampling` is linear in what it is given: where it calls the network is a weighted sum of the
image it started from, of noise, and of the network's earlier estimates of x0. Those weights say all that a sampler, its
timesteps and a strength mean, and they are found by running the sampler itself on unit vectors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo
from onestill.engine.protocol import first_latents
from onestill.sampling import sample

__all__ = ["SETTINGS", "walk_table"]

SETTINGS = 3  # columns before the weights: a call's timestep, and what x and the output are multiplied by in x0


def walk_table(
    info: ModelInfo, sampler: str, timesteps: tuple[int, ...], noises: int, has_start: bool
) -> NDArray[np.float32]:
    """A walk of S calls as [S, 3 + T] float32.

    Row i is of call i: its timestep; a and b of x0 = a x + b output; and the weights of its x in T terms, which are the
    image where there is one, the noises, and the S estimates of x0, of which those still to come have weight 0. The
    last estimate is the result.

    Args:
        info: the model.
        sampler: a name in `onestill.sampling.SAMPLERS`.
        timesteps: S of them, falling.
        noises: how many: the one to start from, and then what the sampler adds.
        has_start: whether the walk starts from an image.

    Raises:
        ScheduleError, StepsError: as `onestill.sampling.sample`.
    """
    before = int(has_start) + noises
    units = np.eye(before + len(timesteps))
    inputs: list[NDArray[np.float64]] = []

    def predict_x0(x: NDArray[np.float64], timestep: int) -> NDArray[np.float64]:
        del timestep
        inputs.append(x)
        estimate: NDArray[np.float64] = units[before + len(inputs) - 1]
        return estimate

    noise = iter(units[int(has_start) : before])
    x = first_latents(info, timesteps[0], next(noise), units[0] if has_start else None)
    sample(sampler, predict_x0, x, info.schedule, timesteps, lambda step: next(noise))
    x_alone, output_alone = np.eye(2)
    pairs = np.array([info.schedule.x0(output_alone, x_alone, timestep) for timestep in timesteps])
    table = np.concatenate([np.array(timesteps, dtype=np.float64)[:, None], pairs, np.stack(inputs)], axis=1)
    return table.astype(np.float32)
