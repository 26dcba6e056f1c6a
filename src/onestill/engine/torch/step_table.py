"""A sampling loop as a table of numbers, so that one CUDA graph or compiled function serves every sampler.

Every sampler of `onestill.sampling` is linear: the x of each network call is a weighted sum of the image that sampling
starts from, of the noises, and of the network's earlier estimates of x0. These weights are all that a sampler, its
timesteps and a strength mean. They are found by running the sampler itself on unit vectors.

Shapes: S calls of the network, T terms of the sums.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onestill.checkpoint import ModelInfo
from onestill.engine.protocol import first_latents
from onestill.sampling import sample

# Columns before the weights: a call's timestep, what x and the output are multiplied by in x0, and alpha and sigma.
SETTINGS = 5


def step_table(
    info: ModelInfo, sampler: str, timesteps: tuple[int, ...], noises: int, has_start: bool
) -> NDArray[np.float32]:
    """The sampling loop of S calls as [S, 5 + T] float32.

    Row i describes call i: its timestep; a and b of x0 = a x + b output; alpha and sigma of its noise level; and the
    weights of its x in T terms. The terms are the image where there is one, the noises, and the S estimates of x0, of
    which later ones have weight 0. The last estimate is the result.

    Args:
        info: the model.
        sampler: a name in `onestill.sampling.SAMPLERS`.
        timesteps: S of them, falling.
        noises: how many: the one to start from, and then what the sampler adds.
        has_start: whether sampling starts from an image.

    Raises:
        ScheduleError, StepsError: as `onestill.sampling.sample`.
    """
    before = int(has_start) + noises
    units = np.eye(before + len(timesteps))  # term i as a vector: what is computed from them has the weights
    inputs: list[NDArray[np.float64]] = []

    def predict_x0(x: NDArray[np.float64], timestep: int) -> NDArray[np.float64]:
        del timestep
        inputs.append(x)
        estimate: NDArray[np.float64] = units[before + len(inputs) - 1]
        return estimate

    noise = iter(units[int(has_start) : before])
    x = first_latents(info, timesteps[0], next(noise), units[0] if has_start else None)
    sample(sampler, predict_x0, x, info.schedule, timesteps, lambda step: next(noise))
    x_alone, output_alone = np.eye(2)  # likewise, x0 is linear in x and the network's output
    pairs = np.array([info.schedule.x0(output_alone, x_alone, timestep) for timestep in timesteps])
    levels = np.array([info.schedule.at(timestep) for timestep in timesteps])
    table = np.concatenate([np.array(timesteps, dtype=np.float64)[:, None], pairs, levels, np.stack(inputs)], axis=1)
    return table.astype(np.float32)
