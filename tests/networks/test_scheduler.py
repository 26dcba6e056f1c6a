"""Every scheduler class that diffusers exports, and every field of its config: diffusers' latents, or a refusal."""

from __future__ import annotations

import inspect
import json
import re
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
from onestill.errors import CheckpointError, NotFiniteError, OnestillError, ScheduleError, StepsError
from onestill.networks.libraries import quiet_libraries
from onestill.pipeline import Pipeline
from tests.on_cpu import load
from tests.tiny_sd import BETAS, tiny_pipeline

# diffusers' schedulers hand tensors to np.array, which NumPy 2 wants done otherwise.
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "a red apple on a table"
STEPS = 4
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
        self.folder, self.theirs, self.family = folder, pipe, family
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
        text_to_image, image_to_image = KINDS[self.family]
        kind = image_to_image if "image" in settings else text_to_image
        options = {} if self.family == "sdxl" else {"requires_safety_checker": False}
        pipe = kind(**self.theirs.components | {"scheduler": scheduler}, **options)
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator("cpu").manual_seed(3 + i) for i in range(2)]
        options = {"num_inference_steps": STEPS, "guidance_scale": 1.0} | settings
        return pipe([PROMPT] * 2, generator=generators, output_type="latent", **options).images.numpy()

    def compare(self, name: str, config: dict[str, Any], **settings: Any) -> tuple[float, str]:
        """The largest difference, as a share of the largest latent above 1; and the refusal where there is one."""
        try:
            found = self.ours(name, config, **settings)
        except NotFiniteError as error:
            with quiet_libraries(), np.errstate(all="ignore"):
                assert not np.isfinite(self.diffusers(name, config, **settings)).all()
            return 0.0, str(error)
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


KINDS = {
    "sd15": (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline),
    "sdxl": (diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLImg2ImgPipeline),
}


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    with quiet_libraries():
        return Both(tmp_path_factory.mktemp("models") / request.param, request.param)


def rest(config: dict[str, Any]) -> dict[str, Any]:
    """What a config has beside the usual, for a failure's text."""
    return {field: value for field, value in config.items() if BETAS.get(field) != value and field != "trained_betas"}


# --- classes and fields ---


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in DRAWN])
def test_a_class_for_other_models_is_refused(both: Both, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"The scheduler {name} does not draw Stable Diffusion's models; give"):
        both.ours(name, BETAS)


@pytest.mark.parametrize("name", DRAWN)
def test_every_class_draws_what_diffusers_draws(both: Both, name: str) -> None:
    difference, refusal = both.compare(name, BETAS)
    assert not refusal
    assert difference <= LATENTS
    difference, refusal = both.compare(name, BETAS, num_inference_steps=7)  # which divides no 1000
    assert difference <= LATENTS


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", OURS)
def test_the_classes_that_we_draw_ourselves_agree_at_every_spacing(both: Both, name: str, spacing: str) -> None:
    plain = {"clip_sample": False, "set_alpha_to_one": True} if name == "DDIMScheduler" else {}
    difference, refusal = both.compare(name, {**BETAS, **plain, "timestep_spacing": spacing}, num_inference_steps=7)
    assert not refusal
    assert difference <= LATENTS


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_every_field_is_diffusers_own_or_refused(both: Both, name: str) -> None:
    refused = []
    for config in configs(name):
        difference, refusal = both.compare(name, config)
        assert difference <= LATENTS, rest(config)
        if refusal:
            refused.append((rest(config), refusal))
    # A random network meets sigmas of 1e4 there, and diffusers' own latents are not finite either.
    known = "beta_schedule|prediction_type|nothing about x0|cannot make this|cannot take|no learned variance|Flow|NaN"
    assert [found for found in refused if not re.search(known, found[1])] == []


@pytest.mark.parametrize(
    "config",
    [
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "linspace", "use_karras_sigmas": True},
        {"prediction_type": "v_prediction"},
    ],
)
def test_guidance_and_starting_images_are_diffusers_own(both: Both, config: dict[str, Any]) -> None:
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"):
        difference, refusal = both.compare(
            name, {**BETAS, **config, "skip_prk_steps": True}, guidance_scale=3.0, num_inference_steps=3
        )
        assert not refusal
        assert difference <= 3 * LATENTS
    picture = PIL.Image.new("RGB", (64, 64), "orange")
    name, given = "HeunDiscreteScheduler", {**BETAS, **config}
    found = both.ours(name, given, image=picture, strength=0.5)
    start = torch.from_numpy(both.pipe.engine.encode_image(np.asarray(picture)[None])).repeat(2, 1, 1, 1)
    with quiet_libraries():
        expected = both.diffusers(name, given, image=start, strength=0.5)
    assert np.abs(found - expected).max() <= LATENTS * max(1.0, np.abs(expected).max())


def test_an_image_does_not_depend_on_its_batch(both: Both) -> None:
    for name in ("DPMSolverMultistepScheduler", "SASolverScheduler"):
        config = {**BETAS, "algorithm_type": "sde-dpmsolver++"} if name.startswith("DPM") else BETAS
        batch = both.ours(name, config)
        alone = both.ours(name, config, seed=[4, 3])
        np.testing.assert_allclose(alone[::-1], batch, atol=1e-5)


# --- refusals, notes and choices by hand ---


def test_what_cannot_be_drawn_is_one_sentence(both: Both) -> None:
    with pytest.raises(ScheduleError, match=r"cannot make this DEISMultistepScheduler \(.*choose a preset"):
        both.ours("DEISMultistepScheduler", {**BETAS, "algorithm_type": "sde-dpmsolver"})
    picture = PIL.Image.new("RGB", (64, 64))
    with pytest.raises(StepsError, match="less than one of 4 steps; take at least 10"):
        both.ours("PNDMScheduler", BETAS, image=picture, strength=0.1)
    with pytest.raises(StepsError, match="cannot take 50 steps"):
        both.ours("TCDScheduler", {**BETAS, "original_inference_steps": 25}, num_inference_steps=50)


def test_a_sampler_by_hand_takes_a_schedulers_place_and_says_so(both: Both) -> None:
    engine = both.pipe.engine
    engine.info = describe(write(both.folder, "PNDMScheduler", {**BETAS, "skip_prk_steps": True}))  # type: ignore[misc]
    pipe = Pipeline(engine)
    assert (pipe.info.sampler, pipe.info.scheduler["_class_name"]) == ("PNDMScheduler", "PNDMScheduler")
    out = pipe("a", num_inference_steps=2, sampler="ddim", seed=1)
    assert out.notes == ["The model's own PNDMScheduler was left out: 'ddim' drew at leading timesteps."]
    assert pipe("a", num_inference_steps=2, seed=1).notes == []
    engine.info = describe(write(both.folder, "EDMEulerScheduler", {}))  # type: ignore[misc]
    with pytest.raises(ScheduleError, match="EDM's; leave out the sampler"):
        Pipeline(engine)("a", num_inference_steps=2, sampler="ddim")
    with pytest.raises(CheckpointError, match="EDM's; leave out the preset"):
        describe(both.folder, Additions(preset="base"))


def test_a_schedule_by_hand(both: Both) -> None:
    folder = write(both.folder, "EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "trailing"})
    assert describe(folder).schedule.prediction_type == "epsilon"
    info = describe(folder, Additions(schedule="v"))
    assert (info.schedule.prediction_type, info.sampler, info.scheduler) == ("v_prediction", "euler", {})
    assert describe(folder, Additions(schedule="v-zsnr", preset="base")).schedule.alphas_cumprod[-1] == 0
    edm = describe(folder, Additions(schedule="edm-v"))
    assert (edm.sampler, edm.scheduler["sigma_max"]) == ("EDMEulerScheduler", 120.0)
    with pytest.raises(OnestillError, match="Did you mean 'edm'"):
        describe(folder, Additions(schedule="edmm"))


def test_the_index_names_the_class_as_for_diffusers(both: Both) -> None:
    write(both.folder, "EulerDiscreteScheduler", BETAS)
    config = both.folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("EulerDiscreteScheduler", "PNDMScheduler"))
    assert describe(both.folder).scheduler["_class_name"] == "EulerDiscreteScheduler"
