"""How many steps a model takes, by its scheduler or by a preset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from onestill.checkpoint import Additions, describe
from onestill.checkpoint.presets import PRESETS
from onestill.errors import OnestillError
from tests.tiny_sd import tiny_sd


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl")


def test_presets_say_how_a_student_draws(folder: Path) -> None:
    for name, preset in PRESETS.items():
        info = describe(folder, Additions(preset=name))
        assert (info.num_inference_steps, info.sampler, info.preset) == (
            preset.num_inference_steps,
            preset.sampler,
            name,
        )
    assert describe(folder, Additions(preset="dmd2")).timesteps(1) == [399]
    assert describe(folder, Additions(preset="lcm")).timesteps(4) == [999, 759, 499, 259]
    assert describe(folder, Additions(preset="lightning-x0")).schedule.prediction_type == "sample"
    assert describe(folder).preset == ""


@pytest.mark.parametrize(
    ("scheduler", "preset"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, "base"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}, "base"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "turbo"),
        ({"_class_name": "LCMScheduler"}, "lcm"),
    ],
)
def test_only_a_folder_that_says_so_draws_in_few_steps(
    folder: Path, tmp_path: Path, scheduler: dict[str, str], preset: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", scheduler["_class_name"]]}))
    info = describe(copy)
    assert (info.num_inference_steps, info.guidance_scale) == (
        PRESETS[preset].num_inference_steps,
        PRESETS[preset].guidance_scale,
    )


def test_an_unknown_preset_names_the_nearest(folder: Path) -> None:
    with pytest.raises(OnestillError, match="Did you mean 'turbo'"):
        describe(folder, Additions(preset="turboo"))


def test_the_scheduler_config_decides_what_a_folder_is(folder: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(folder, tmp_path / "sdxl-turbo-by-name-only"))
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_spacing": "leading"}))
    info = describe(other)
    assert (info.num_inference_steps, info.guidance_scale, info.unit_noise) == (25, 5.0, True)
    assert describe(folder).num_inference_steps == 1
