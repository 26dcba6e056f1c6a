"""Every scheduler class that diffusers exports, and every field of its config: diffusers' latents, or a refusal."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

from onestill.checkpoint import Additions, describe
from onestill.checkpoint.scheduler_config import DRAWN, OURS
from onestill.errors import CheckpointError, OnestillError, ScheduleError, StepsError
from onestill.networks.libraries import quiet_libraries
from onestill.pipeline import Pipeline
from tests.on_cpu import load
from tests.tiny_sd import BETAS, tiny_pipeline

# diffusers' schedulers hand tensors to np.array, which NumPy 2 wants done otherwise.
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "a red apple on a table"
STEPS = 5
LATENTS = 1e-4  # of the largest latent where that is above 1: diffusers' Euler holds x / alpha in float32
CLASSES = sorted(
    name for name in dir(diffusers) if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type)
)
# Values that no default is, for the fields of any scheduler; those that are not here are numbers or switches.
VALUES: dict[str, list[Any]] = {
    "algorithm_type": [
        "dpmsolver",
        "dpmsolver++",
        "sde-dpmsolver",
        "sde-dpmsolver++",
        "deis",
        "data_prediction",
        "noise_prediction",
    ],
    "beta_schedule": ["linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace"],
    "final_sigmas_type": ["sigma_min", "zero"],
    "flow_shift": [3.0],
    "interpolation_type": ["log_linear"],
    "lambda_min_clipped": [-5.1],
    "num_train_timesteps": [500],
    "original_inference_steps": [25],
    "prediction_type": ["sample", "v_prediction", "flow_prediction"],
    "sigma_schedule": ["exponential"],
    "sigma_max": [10.0],
    "sigma_min": [0.1],
    "solver_order": [1, 3],
    "solver_type": ["heun", "bh1", "logrho", "midpoint"],
    "steps_offset": [0, 2],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "timestep_type": ["continuous"],
    "trained_betas": [np.linspace(0.001, 0.02, 1000).tolist()],
    "variance_type": ["fixed_large", "fixed_small_log", "learned", "learned_range"],
    "time_shift_type": ["linear"],
}


def values(field: str, default: Any) -> list[Any]:
    if field in VALUES:
        return [value for value in VALUES[field] if value != default]
    if isinstance(default, bool) or default is None:
        return [not default]
    return [default + 1] if isinstance(default, int) else [default * 0.7] if isinstance(default, float) else []


def configs(name: str) -> Iterator[dict[str, Any]]:
    """A config with the class's defaults, then one for each field and value that is not."""
    usual = {key: value for key, value in BETAS.items() if key in DRAWN or key != "steps_offset"}
    usual |= {"steps_offset": 1}
    yield usual
    for field, parameter in inspect.signature(getattr(diffusers, name).__init__).parameters.items():
        if parameter.default is not parameter.empty:
            yield from (usual | {field: value} for value in values(field, parameter.default))


def write(folder: Path, name: str, config: dict[str, Any]) -> Path:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "_class_name": name}))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class Both:
    """One model as onestill and as diffusers draw it, of which only the scheduler is changed."""

    def __init__(self, folder: Path, family: str) -> None:
        pipe = tiny_pipeline(family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe.unet = small_unet(pipe.unet)  # hundreds of pictures are drawn with it
        pipe.save_pretrained(folder)
        self.folder, self.theirs = folder, pipe
        self.pipe = load(folder)

    def ours(self, name: str, config: dict[str, Any], **settings: Any) -> Any:
        """Latents [B, C, h, w]; raises what onestill refuses the scheduler with."""
        engine = self.pipe.engine
        engine.info = describe(write(self.folder, name, config))  # type: ignore[misc]
        kept: list[Any] = []

        def keep(latents: Any) -> Any:
            kept.append(latents)
            return np.zeros((len(latents), 64, 64, 3), np.uint8)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "decode", keep)
            Pipeline(engine)(
                [PROMPT] * 2, **{"guidance_scale": 1.0, "num_inference_steps": STEPS, "seed": 3} | settings
            )
        return np.concatenate(kept)

    def diffusers(self, name: str, config: dict[str, Any], **settings: Any) -> Any:
        scheduler = getattr(diffusers, name).from_config(config)
        pipe = type(self.theirs)(**self.theirs.components | {"scheduler": scheduler}, **OPTIONS[type(self.theirs)])
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(3 + i) for i in range(2)]
        options = {"num_inference_steps": STEPS, "guidance_scale": 1.0} | settings
        return pipe([PROMPT] * 2, generator=generators, output_type="latent", **options).images.numpy()

    def compare(self, name: str, config: dict[str, Any], **settings: Any) -> tuple[float, str]:
        """The largest difference, as a share of the largest latent above 1; and the refusal where there is one."""
        try:
            found = self.ours(name, config, **settings)
        except OnestillError as error:
            return 0.0, str(error)
        with quiet_libraries():
            expected = self.diffusers(name, config, **settings)
        return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max())), ""


def small_unet(unet: Any) -> Any:
    """A UNet of one block that takes what this one takes."""
    config = {
        **unet.config,
        "block_out_channels": (32,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "transformer_layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    small = type(unet).from_config(config)
    small.conv_out.weight.data *= 4
    return small.eval()


OPTIONS = {
    diffusers.StableDiffusionPipeline: {"requires_safety_checker": False},
    diffusers.StableDiffusionXLPipeline: {},
}


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    with quiet_libraries():
        return Both(tmp_path_factory.mktemp("models") / request.param, request.param)
