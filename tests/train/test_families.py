"""The methods on the real classes of SD 1.5, SD 2.1 and SDXL at tiny width: cached, trained, exported, opened again."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from onestill.errors import CheckpointError, RecipeError
from onestill.networks.latents import LatentSpace
from onestill.networks.libraries import quiet_libraries
from onestill.networks.text_encoder import open_text_encoder
from onestill.train.batches import collate_latents
from onestill.train.cache import cache_samples
from onestill.train.loop import train
from onestill.train.methods import add, ladd, lcm
from onestill.train.noise import Draw
from onestill.train.optim.step import Update
from onestill.train.recipe import parse_recipe
from onestill.train.state import TrainState, trained
from tests.tiny import tiny_autoencoder
from tests.train.models import PREDICTION, SIDE, write_model
from tests.train.parts import nested, save_dinov2

METHODS: dict[str, Any] = {"add": add, "ladd": ladd, "lcm": lcm}
PROMPTS = ["a red star", "a blue cat"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    for family in PREDICTION:
        write_model(folder / family, family)
    save_dinov2(folder / "dinov2")
    tiny_autoencoder().save_pretrained(folder / "tiny-vae")
    return folder


def cached(model: Path) -> dict[str, Any]:
    """A batch of four captioned pictures, cached as `onestill data cache` does it."""
    draw = np.random.default_rng(0)
    captions = ["a red star", "a blue cat", "", "a star"]
    metas = [{"original_size": [64, 48], "crop": [3, 0]}, {"original_size": None, "crop": 3}, {}, {}]
    samples = [
        SimpleNamespace(image=draw.integers(0, 256, (32, 32, 3), dtype=np.uint8), caption=caption, meta=meta)
        for caption, meta in zip(captions, metas, strict=True)
    ]
    made: list[Any] = []

    def write(sample: Any, arrays: Any) -> None:
        made.append(SimpleNamespace(image=np.zeros((0, 0, 3)), caption=sample.caption, arrays=dict(arrays)))

    assert cache_samples(samples, LatentSpace.load(model / "vae"), open_text_encoder(str(model)), write, 3) == 4
    return collate_latents(made)


class SameBatch:
    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def next(self) -> dict[str, Any]:
        return self.batch

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Any) -> None:
        raise NotImplementedError


def recipe_for(model: Path, name: str, out: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"teacher": str(model), "autoencoder": "", "text_encoder": "", "sheet_prompts": PROMPTS}
    given |= {} if name == "lcm" else {"heads__width": 8}
    given |= {"features__network": "teacher"} if name == "add" else {}
    loop = {"iterations": 2, "batch_size": 4, "log_every": 1, "warmup": 0, "ema_decay": 0.5}
    table = {
        "name": f"tiny-{name}",
        "method": name,
        "out": str(out),
        "loop": loop,
        name: nested({"lr": 1e-2, **given, **options}),
    }
    return parse_recipe(table)


def distil(model: Path, name: str, out: Path, **options: Any) -> tuple[Any, TrainState]:
    recipe = recipe_for(model, name, out, **options)
    method = METHODS[name].Method(recipe.options, recipe.loop)
    return method, train(recipe, method, SameBatch(cached(model)))


def moved(state: TrainState, model: Path) -> int:
    """How many of the UNet's tensors are no longer the teacher's."""
    before = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    now = state.networks["student"].state_dict()
    return sum(name in now and not torch.equal(now[name], value) for name, value in before.items())


PIXELS = {
    "features__network": "vit",
    "features__vit_layers": [0, 2],
    "features__vit_size": 16,
    "distillation__space": "pixels",
}
RUNS = [
    ("sd15", "add", {"gradient_checkpointing": True}),
    ("sd21", "add", {"distillation__weighting": "sds", "frozen_dtype": "bfloat16"}),
    ("sd21", "lcm", {"ddim_steps": 20}),
    ("sdxl", "add", {**PIXELS, "distillation__weighting": "nfsd"}),
    ("sdxl", "ladd", {"lora_rank": 2}),
    ("sdxl", "lcm", {"target": "average"}),
]


@pytest.mark.parametrize(("family", "name", "options"), RUNS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_family_is_distilled_and_diffusers_draws_the_same(
    models: Path, tmp_path: Path, family: str, name: str, options: dict[str, Any]
) -> None:
    model = models / family
    if options.get("features__network") == "vit":
        options = {**options, "features__vit": str(models / "dinov2"), "decoder": str(models / "tiny-vae")}
    method, state = distil(model, name, tmp_path, **options)
    assert state.bad_steps == 0
    assert (moved(state, model) > 20) == ("lora_rank" not in options)
    assert method.student_denoiser.schedule.prediction_type == PREDICTION[family]
    with state.using_average("student"):
        ours = method.sheet_x0(1)
    torch.testing.assert_close(drawn(model, tmp_path / "export", method), ours, rtol=2e-3, atol=2e-3)
    numbers = json.loads((tmp_path / "sheets/00000002.json").read_text())
    assert numbers.keys() == ({"steps_2_to_1", "steps_4_to_1"} if name == "lcm" else {"steps_4_to_1"})
    scheduler = json.loads((tmp_path / "export/scheduler/scheduler_config.json").read_text()) if name == "lcm" else {}
    assert scheduler.get("original_inference_steps") == getattr(method.options, "ddim_steps", None)
    card = (tmp_path / "export/README.md").read_text()
    assert "license: openrail++" in card
    assert f'"name": "tiny-{name}"' in card
    assert '"iteration": 2' in card


WIDE = [
    ("sd15", "add", {"features__latents_too": True, "adversarial__misaligned": 1.0,
                     "discriminator_input__augment": ["cutout"]}),
    ("sd21", "add", {**PIXELS, "features__network": "vit", "discriminator_input__crop": 3}),
    ("sdxl", "ladd", {}),
    ("sd21", "lcm", {}),
]  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 8), (8, 2), (6, 5)])
@pytest.mark.parametrize(("family", "name", "options"), WIDE, ids=lambda part: part if isinstance(part, str) else "")
def test_latents_that_are_not_square_train(
    models: Path, tmp_path: Path, family: str, name: str, options: dict[str, Any], shape: tuple[int, int]
) -> None:
    model = models / family
    if options.get("features__network") == "vit":
        options = {**options, "features__vit": str(models / "dinov2"), "decoder": str(models / "tiny-vae")}
    recipe = recipe_for(model, name, tmp_path, **options)
    method = METHODS[name].Method(recipe.options, recipe.loop)
    method.to(torch.device("cpu"))
    state = TrainState(method.networks, method.optimizers, {}, torch.Generator().manual_seed(0))
    batch = cached(model)
    batch |= {"latents": torch.randn(4, 4, *shape), "captions": list("abcd")}
    for name, loss, _ in method.step(state, batch):
        Update(state, recipe.loop)(name, loss)
    assert all(p.grad is None and torch.isfinite(p).all() for net in state.networks.values() for p in net.parameters())
    if hasattr(method, "inputs"):  # the heads see the whole of it, each place beside its neighbours
        x = batch["latents"].requires_grad_()
        told = method.read(batch)[1]
        features = method.inputs.draw(x, state.draw).features(x, told)
        (gradient,) = torch.autograd.grad(sum(one.square().sum() for one in features), x)
        seen = gradient.abs().sum((0, 1)) > 0
        assert seen.all() if "discriminator_input__crop" not in options else seen.any()


def drawn(model: Path, export: Path, method: Any) -> Tensor:
    """The sheet's prompts in one step by diffusers' own pipeline, from the same noise."""
    with quiet_libraries():
        if method.options.lora_rank:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
            pipeline.load_lora_weights(export)
            kind = diffusers.EulerAncestralDiscreteScheduler
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        else:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(export)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.stack([torch.randn(4, SIDE, SIDE, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    if method.student_denoiser.schedule.prediction_type == "epsilon" and method.sampler == "euler_ancestral":
        # diffusers starts Stable Diffusion's table at sigma times the noise, not at the root of sigma^2 + 1.
        sigma = method.student_denoiser.schedule.at(999)[1]
        noise = noise / sigma
    guidance = getattr(method.options, "sheet_guidance", 0.0)
    asked = {"latents": noise, "num_inference_steps": 1, "guidance_scale": guidance, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # diffusers' schedulers, of NumPy 2
        found: Tensor = pipeline(PROMPTS, height=32, width=32, **asked).images
    return found


def test_what_the_cache_tells_sdxl_is_what_its_pipeline_tells_it(models: Path) -> None:
    batch = cached(models / "sdxl")
    with quiet_libraries():
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(models / "sdxl")
    text, negative, pooled, _ = pipeline.encode_prompt(["a red star", "a blue cat"], negative_prompt=["", ""])
    torch.testing.assert_close(batch["text"][:2], text, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(batch["pooled"][:2], pooled, rtol=1e-2, atol=1e-2)
    assert batch["sizes"].tolist()[:2] == [[64, 48, 3, 0, 32, 32], [32, 32, 0, 0, 32, 32]]
    assert batch["text"][2].abs().sum() == batch["pooled"][2].abs().sum() == 0  # SDXL's empty prompt
    assert batch["text"].shape[-1] == 16 + 24
    assert negative is not None


def test_a_lora_trains_and_keeps_the_adapter_alone(models: Path, tmp_path: Path) -> None:
    method, state = distil(models / "sd15", "add", tmp_path, lora_rank=2)
    assert moved(state, models / "sd15") == 0
    kept = load_file(tmp_path / "checkpoints/00000002/student.safetensors")
    assert kept
    assert all(".lora_" in name for name in kept)
    assert kept.keys() == trained(method.student).keys() == state.ema["student"].keys()
    assert any(value.abs().sum() > 0 for name, value in kept.items() if "lora_B" in name)
    assert (tmp_path / "export/pytorch_lora_weights.safetensors").is_file()


def test_a_random_student_is_not_the_teacher(models: Path, tmp_path: Path) -> None:
    recipe = recipe_for(models / "sd15", "add", tmp_path, student="random")
    method = add.Method(recipe.options, recipe.loop)
    state = TrainState(method.networks, method.optimizers, {}, torch.Generator())
    assert moved(state, models / "sd15") > 50


def test_lcm_starts_as_its_teacher_and_agrees_on_a_path_that_is_there(models: Path, tmp_path: Path) -> None:
    recipe = recipe_for(models / "sd21", "lcm", tmp_path)
    method = lcm.Method(recipe.options, recipe.loop)
    batch = cached(models / "sd21")
    x0, told = method.read(batch)
    t = torch.tensor([999, 499, 259, 19])
    with torch.no_grad():
        w = torch.tensor([3.0, 5.0, 8.0, 15.0])
        student, teacher = method.student_denoiser.x0(x0, t, told, w), method.teacher_denoiser.x0(x0, t, told)
        torch.testing.assert_close(student, teacher)
        assert torch.equal(method.consistent(x0, torch.zeros(4, dtype=torch.long), told, w), x0)


def test_lcm_embeds_the_guidance_scale_where_the_teachers_config_is_older_than_that(
    models: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(models / "sd21", teacher)
    config = teacher / "unet/config.json"
    known = json.loads(config.read_text())
    del known["time_cond_proj_dim"]  # Stable Diffusion 1.5's own config does not name it
    config.write_text(json.dumps(known))
    recipe = recipe_for(teacher, "lcm", tmp_path)
    method = lcm.Method(recipe.options, recipe.loop)
    assert method.student.config["time_cond_proj_dim"] == 256
    assert method.student.time_embedding.cond_proj is not None


def test_ladd_practises_on_little_noise_first_and_judges_at_its_own_levels(models: Path, tmp_path: Path) -> None:
    recipe = recipe_for(
        models / "sd21", "ladd", tmp_path, discriminator_input__logit_mean=-2.0, discriminator_input__logit_std=0.5
    )
    method = ladd.Method(recipe.options, recipe.loop)
    state = TrainState(method.networks, method.optimizers, {}, torch.Generator().manual_seed(0))
    assert set(method.student_timesteps(200, state).tolist()) == {499, 249}
    state.iteration = 500
    assert (method.student_timesteps(4000, state) == 999).float().mean().item() == pytest.approx(0.7, abs=0.03)
    levels = method.draw_levels(4000, Draw(torch.Generator().manual_seed(0)))
    middle = 999 / (1 + np.exp(2.0))
    assert float(levels.float().median()) == pytest.approx(middle, rel=0.05)
    assert method.discriminator.heads[0].level is not None
    assert method.discriminator.heads[0].image is None


@pytest.mark.parametrize(
    ("name", "options", "error", "sentence"),
    [
        ("add", {"student": "sdxl"}, RecipeError, "text widths differ"),
        ("add", {"text_encoder": "sdxl"}, RecipeError, "text encoder that it was trained with"),
        ("add", {"autoencoder": "none"}, CheckpointError, "AutoencoderTiny or AutoencoderKL"),
        ("lcm", {"lora_rank": 2}, RecipeError, "embed_guidance = false"),
        ("lcm", {"lora_rank": 2, "embed_guidance": False}, RecipeError, "to one value"),
        ("lcm", {"guidance_low": 9.0, "guidance_high": 3.0}, RecipeError, "must not be above"),
        ("ladd", {"student_input__warm_weights": [1.0]}, RecipeError, "one number for each"),
    ],
)
def test_parts_that_do_not_fit(
    models: Path, tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    placed = {k: str(models / v) if k in ("student", "text_encoder", "autoencoder") else v for k, v in options.items()}
    recipe = recipe_for(models / "sd15", name, tmp_path, **placed)
    with pytest.raises(error, match=sentence):
        METHODS[name].Method(recipe.options, recipe.loop)
