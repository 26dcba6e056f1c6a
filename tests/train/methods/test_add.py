from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onestill.errors import CheckpointError, RecipeError
from onestill.networks.denoiser import Denoiser
from onestill.sampling import sample_ddim
from onestill.schedule import NoiseSchedule, add_noise, scaled_linear_alphas_cumprod
from onestill.train.discriminator.features import LatentFeatures
from onestill.train.discriminator.heads import HeadCondition
from onestill.train.loop import train
from onestill.train.losses import distillation, sds_weight
from onestill.train.methods.add import Method
from onestill.train.noise import Draw
from onestill.train.recipe import parse_recipe
from onestill.train.state import TrainState, start_ema
from tests.train.parts import CHANNELS, SIZE, add_method, add_recipe, condition, latents_batch, write_parts
from tests.train.small import rows


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def new_state(method: Method, seed: int = 0) -> TrainState:
    generator = torch.Generator().manual_seed(seed)
    ema = {role: start_ema(method.networks[role]) for role in method.averaged}
    return TrainState(method.networks, method.optimizers, ema, generator)


class Turns:
    """An `update` that looks and does not touch: the losses, and which networks each turn gives gradients."""

    def __init__(self, method: Method) -> None:
        self.method, self.losses, self.reached = method, dict[str, float](), dict[str, set[str]]()

    def __call__(self, name: str, loss: Tensor) -> Tensor:
        everything = {**self.method.networks, "teacher": self.method.teacher, "decoder": self.method.space.autoencoder}
        loss.backward(retain_graph=True)
        self.losses[name] = loss.item()
        self.reached[name] = {role for role, network in everything.items() if _has_gradient(network)}
        for network in everything.values():
            network.zero_grad(set_to_none=True)
        return torch.zeros(())


def _has_gradient(network: nn.Module) -> bool:
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


KINDS: list[dict[str, Any]] = [
    {"feature_network": "both"},
    {"feature_network": "tower", "weighting": "sds", "teacher_guidance": 3.0},
    {"feature_network": "teacher", "condition_on_text": False, "condition_on_image": False},
    {"feature_network": "teacher", "latents_too": True, "head_blocks": 2},
    {"feature_network": "tower", "adversarial_space": "pixels", "tower": "pixels", "distillation_space": "pixels"},
    {"feature_network": "vit", "distillation_space": "pixels", "crop": 2, "weighting": "nfsd", "misaligned": 1.0,
     "augment": ["colour", "translation", "cutout"], "condition_on_image": True, "vit_size": 8},
    {"feature_network": "cnn+teacher", "cnn": "lite0", "latents_too": True, "condition_on_level": True},
    {"feature_network": "teacher", "teacher_steps": 3, "condition_on_level": True, "gradient_checkpointing": True},
    {"feature_network": "teacher", "lora_rank": 2, "frozen_dtype": "bfloat16", "score_weight": "sigma_squared",
     "weighting": "sds", "head_text_encoder": "model"},
]  # fmt: skip


def placed(parts: Path, options: dict[str, Any]) -> dict[str, Any]:
    here = {key: str(parts / options[key]) for key in ("tower", "cnn", "head_text_encoder") if key in options}
    if options["feature_network"] == "vit":
        here |= {"vit": str(parts / "dinov2"), "vit_layers": [0, 2], "image_encoder": str(parts / "dinov2")}
        here |= {"image_encoder_size": 12}
    return {**options, **here}


@pytest.mark.parametrize("options", KINDS)
def test_each_turn_reaches_its_own_network_alone(parts: Path, options: dict[str, Any]) -> None:
    method = add_method(parts, **placed(parts, options))
    turns = Turns(method)
    metrics = method.step(new_state(method), latents_batch(), turns)
    assert turns.reached == {"discriminator": {"discriminator"}, "student": {"student"}}
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())
    for features in method.views.networks:
        if isinstance(features, LatentFeatures):
            continue  # it has no weights
        inner: Any = next(
            getattr(features, name) for name in ("tower", "model", "network", "denoiser") if hasattr(features, name)
        )
        inner = getattr(inner, "unet", inner)
        assert not inner.training
        assert not any(p.requires_grad for p in inner.parameters())
    assert all(p.requires_grad for p in method.discriminator.parameters())


@pytest.mark.parametrize("turn", ["student", "discriminator"])
def test_a_turn_leaves_the_other_network_untouched(parts: Path, turn: str) -> None:
    method = add_method(parts, feature_network="both")
    before = {role: [p.clone() for p in net.parameters()] for role, net in method.networks.items()}
    teacher = [p.clone() for p in method.teacher.parameters()]

    def update(name: str, loss: Tensor) -> Tensor:
        if name == turn:
            method.optimizers[name].zero_grad()
            loss.backward()
            method.optimizers[name].step()
        return torch.zeros(())

    method.step(new_state(method), latents_batch(), update)
    for role, network in method.networks.items():
        moved = any(not torch.equal(a, b) for a, b in zip(before[role], network.parameters(), strict=True))
        assert moved == (role == turn)
    assert all(torch.equal(a, b) for a, b in zip(teacher, method.teacher.parameters(), strict=True))


def test_student_and_teacher_share_no_memory(parts: Path) -> None:
    method = add_method(parts, feature_network="teacher")
    mine = {p.data_ptr() for p in method.student.parameters()}
    assert not mine & {p.data_ptr() for p in method.teacher.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(method.student.parameters(), method.teacher.parameters(), strict=True))


def test_at_zero_snr_x0_is_minus_v_and_the_image_is_gone(parts: Path) -> None:
    method = add_method(parts, feature_network="teacher")
    denoiser = method.student_denoiser
    s = torch.full((2,), 999)
    alpha, sigma = denoiser.signal(s)
    assert alpha.flatten().tolist() == [0.0, 0.0]
    assert sigma.flatten().tolist() == [1.0, 1.0]
    noise, told = torch.randn(2, CHANNELS, SIZE, SIZE), condition(latents_batch(2))
    with torch.no_grad():
        torch.testing.assert_close(denoiser.x0(noise, s, told), -denoiser.output(noise, s, told))


def test_the_image_condition_is_dropped_where_the_student_saw_nothing(parts: Path) -> None:
    method = add_method(parts, feature_network="both")
    batch, s = latents_batch(2), torch.tensor([999, 749])

    def image(method: Method) -> Tensor | None:
        view = method.views.draw(batch["latents"], Draw(torch.Generator()))
        return method.head_condition(batch["latents"], s, view, condition(batch), batch).image

    dropped = image(method)
    assert dropped is not None
    assert dropped[0].abs().sum() == 0
    assert dropped[1].abs().sum() > 0
    kept = image(add_method(parts, feature_network="both", drop_image_at_terminal=False))
    assert kept is not None
    assert kept[0].abs().sum() > 0
    assert image(add_method(parts, condition_on_image=False)) is None


def test_distillation_is_zero_where_the_teacher_agrees(parts: Path) -> None:
    """A teacher that sees x_theta noised next to nothing returns it: at t = 0 the loss all but vanishes."""
    near = add_method(parts, teacher_low=0, teacher_high=0)
    far = add_method(parts, teacher_low=900, teacher_high=900)
    batch = latents_batch()
    losses = []
    for method in (near, far):
        draw = Draw(torch.Generator().manual_seed(0))
        view = method.views.draw(batch["latents"], draw)
        loss = method.distill(batch["latents"], condition(batch), view, draw)
        losses.append(float(loss / method.student_denoiser.signal(torch.tensor([method.options.teacher_low]))[0]))
    assert losses[0] < 0.01 * losses[1]


def test_lambda_scales_the_distillation_alone(parts: Path) -> None:
    made = {}
    for scale in (1e-9, 1.0, 2.5):
        method = add_method(parts, lambda_distill=scale)
        turns = Turns(method)
        metrics = method.step(new_state(method), latents_batch(), turns)
        made[scale] = (turns.losses["student"], float(metrics["distill"].detach()))
    assert made[1e-9][1] == made[2.5][1]
    assert made[2.5][0] - made[1e-9][0] == pytest.approx(2.5 * made[2.5][1], rel=1e-3)
    assert made[1.0][0] - made[1e-9][0] == pytest.approx(made[2.5][1], rel=1e-3)


def test_gamma_weighs_r1(parts: Path) -> None:
    losses = {}
    for gamma in (0.0, 3.0):
        method = add_method(parts, gamma_r1=gamma)
        turns = Turns(method)
        metrics = method.step(new_state(method), latents_batch(), turns)
        losses[gamma] = turns.losses["discriminator"]
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * float(metrics["r1"].detach()), rel=1e-3)


def test_several_teacher_steps_walk_down_the_teachers_path(parts: Path) -> None:
    """From t in equal steps: the same as the sampler's DDIM over those timesteps."""
    method = add_method(parts, teacher_steps=4, teacher_guidance=2.0)
    batch, t = latents_batch(2), torch.tensor([800, 800])
    told, eps = condition(batch), torch.randn(2, CHANNELS, SIZE, SIZE)
    teacher = method.teacher_denoiser
    x_t = add_noise(batch["latents"], eps, *teacher.signal(t))

    def predict_x0(x: Tensor, timestep: int) -> Tensor:
        return teacher.guided_x0(x, torch.full((2,), timestep), told, method.empty, 2.0)

    with torch.no_grad():
        expected = sample_ddim(predict_x0, x_t, teacher.schedule, [800, 600, 400, 200])
        torch.testing.assert_close(method.target(batch["latents"], eps, t, told), expected, rtol=1e-4, atol=1e-4)


def test_nfsd_has_the_gradient_of_its_definition(parts: Path) -> None:
    """d loss / d x_theta = w (delta_D + s delta_C), with both forms of delta_D, from the teacher's own predictions."""
    method = add_method(parts, weighting="nfsd", nfsd_guidance=5.0, score_weight="sigma_squared")
    batch, t = latents_batch(4), torch.tensor([100, 199, 200, 700])
    told, eps = condition(batch), torch.randn(4, CHANNELS, SIZE, SIZE)
    teacher, x_theta = method.teacher_denoiser, batch["latents"].clone().requires_grad_()
    alpha, sigma = teacher.signal(t)
    x_t = add_noise(x_theta.detach(), eps, alpha, sigma)
    with torch.no_grad():
        text, empty, negative = (
            teacher.eps(x_t, t, one) for one in (told, method.empty.expand(4), method.negative.expand(4))
        )
        x_psi = method.target(x_theta.detach(), eps, t, told)
    assert not torch.allclose(negative, empty)
    distillation(x_theta, x_psi, sds_weight(alpha, sigma, sigma.square()).flatten()).backward()
    delta_d = torch.stack([empty[0], empty[1], empty[2] - negative[2], empty[3] - negative[3]])
    expected = sigma.square() * (delta_d + 5.0 * (text - empty))
    assert x_theta.grad is not None
    torch.testing.assert_close(x_theta.grad * x_theta.numel(), expected, rtol=1e-3, atol=1e-4)


def test_the_students_input_is_pure_noise_at_the_end_and_eq_1_before(parts: Path) -> None:
    x0, s = latents_batch(2)["latents"], torch.tensor([999, 499])
    made = {}
    for kind in ("pure", "schedule"):
        method = add_method(parts, terminal_noise=kind)
        # A schedule that ends before zero SNR, as Stable Diffusion's does: there the two differ.
        method.student_denoiser = Denoiser(method.student, NoiseSchedule(scaled_linear_alphas_cumprod()))
        made[kind] = method.noised(x0, s, Draw(torch.Generator().manual_seed(3)))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    alpha, sigma = method.student_denoiser.signal(s)
    torch.testing.assert_close(made["schedule"], alpha * x0 + sigma * eps)
    assert alpha[0] > 0.05
    assert torch.equal(made["pure"][0], eps[0])
    assert torch.equal(made["pure"][1], made["schedule"][1])


def test_misaligned_captions_are_fakes_and_equal_ones_are_not(parts: Path) -> None:
    method = add_method(parts, misaligned=1.0)
    batch = latents_batch()
    real = method.views.draw(batch["latents"], Draw(torch.Generator()))(batch["latents"], condition(batch))
    c = HeadCondition(condition(batch).embedding, method.views.embed(batch["latents"]))
    assert float(method.misaligned(real, c, batch).detach()) == 0  # one caption for all
    batch["captions"] = ["a", "a", "b", "b"]  # rows 0 and 2 follow a row with another caption
    method.discriminator.eval()
    logits = method.discriminator(real, HeadCondition(c.text.roll(1, 0), c.image))  # type: ignore[union-attr]
    expected = sum(torch.relu(1 + one[[0, 2]]).mean() for one in logits)
    torch.testing.assert_close(method.misaligned(real, c, batch), expected)


@pytest.mark.parametrize(("options", "plays"), [({"student_every": 2}, [1, 0, 1]), ({"heads_first": 2}, [0, 0, 1])])
def test_the_student_takes_the_turns_that_it_is_given(parts: Path, options: dict[str, int], plays: list[int]) -> None:
    method = add_method(parts, **options)
    state, turns = new_state(method), []
    for state.iteration in range(3):
        seen = Turns(method)
        method.step(state, latents_batch(), seen)
        turns.append(sorted(seen.losses))
    assert turns == [["discriminator", "student"] if it else ["discriminator"] for it in plays]


def test_without_gamma_r1_is_not_computed(parts: Path) -> None:
    told = {}
    for gamma in (0.0, 1e-5):
        method = add_method(parts, gamma_r1=gamma)
        told[gamma] = float(method.step(new_state(method), latents_batch(), Turns(method))["r1"].detach())
    assert told[0.0] == 0 < told[1e-5]


def test_all_noise_comes_from_the_states_generator(parts: Path) -> None:
    losses = []
    for seed, elsewhere in ((1, 0), (1, 9), (2, 0)):
        method = add_method(parts, feature_network="both", teacher_guidance=2.0)
        torch.manual_seed(elsewhere)
        turns = Turns(method)
        method.step(new_state(method, seed), latents_batch(), turns)
        losses.append(turns.losses)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_student_timesteps_follow_their_weights(parts: Path) -> None:
    method = add_method(parts, student_timesteps=[999, 499], timestep_weights=[3.0, 1.0])
    drawn = method.student_timesteps(4000, new_state(method))
    assert set(drawn.tolist()) == {999, 499}
    assert (drawn == 999).float().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"timestep_weights": [1.0]}, "one number for each"),
        ({"timestep_weights": [0.0] * 4}, "all zero"),
        ({"teacher_low": 900, "teacher_high": 100}, "teacher_low must not be above"),
        ({"feature_low": 900, "feature_high": 100}, "feature_low must not be above"),
        ({"weighting": "nfsd", "teacher_steps": 2}, "takes one teacher step"),
        ({"weighting": "sds", "teacher_high": 999}, "alpha, which is 0"),
        ({"misaligned": 1.0, "condition_on_text": False}, "need condition_on_text"),
        ({"condition_on_level": True}, "needs the teacher's features"),
        ({"augment": ["blur"]}, "may list colour"),
        ({"augment": ["colour"]}, "colour of latents"),
        ({"feature_network": "vit"}, "name its folder"),
        ({"feature_network": "teacher", "shard_teacher": True}, "read block by block"),
    ],
)
def test_options_that_contradict_each_other(parts: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        add_method(parts, **options)


def test_networks_that_are_not_there(parts: Path) -> None:
    for key, sentence in (("teacher", "UNet2DCond"), ("autoencoder", "AutoencoderTiny"), ("tower", "no contrastive")):
        with pytest.raises(CheckpointError, match=sentence):
            add_method(parts, **{key: str(parts / "none")})
    with pytest.raises(CheckpointError, match="no text encoder"):
        add_method(parts, text_encoder="none_of_these")


class LatentsBatches:
    def __init__(self) -> None:
        self.position = 0

    def next(self) -> dict[str, Any]:
        self.position += 1
        return latents_batch(seed=self.position)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def test_it_resumes_to_the_same_losses(parts: Path, tmp_path: Path) -> None:
    """Channels-last weights, spectral norms and two optimizers: more to lose than in the loop's own test."""

    def run(out: str, iterations: int, resume: bool = False) -> None:
        loop = {"iterations": iterations, "batch_size": 4, "log_every": 1, "sheet_every": 99, "checkpoint_every": 2}
        given = dataclasses.asdict(add_recipe(parts, feature_network="both", lr=1e-3).options)
        table = {"name": "tiny", "method": "add", "out": str(tmp_path / out), "loop": loop, "add": given}
        recipe = parse_recipe(table)
        train(recipe, Method(recipe.options, recipe.loop), LatentsBatches(), resume=resume)

    torch.set_num_threads(1)
    run("whole", 5)
    run("parts", 2)
    run("parts", 5, resume=True)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_sheet_and_export(parts: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    method = add_method(parts, feature_network="teacher")
    state = new_state(method)
    pictures, captions, numbers = method.sheet(state)
    assert pictures.dtype == "uint8"
    assert pictures.shape == (len(captions), 32, 32, 3)
    assert not (pictures[:16] == pictures[16:32]).all()  # one step and four differ
    assert numbers["steps_4_to_1"] > 0
    assert captions[32:] == []
    method.step(state, latents_batch(), Turns(method))
    pictures, captions, _ = method.sheet(state)
    assert captions[32:36] == ["from 999"] * 4  # what it makes of the batch, at each student timestep
    assert captions[-4:] == ["from 249"] * 4
    assert len(pictures) == len(captions) == 32 + 16
    assert method.student.training
    method.export(state, tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(v, state.ema["student"][n]) for n, v in loaded.state_dict().items())
