from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onestill.errors import CheckpointError, RecipeError
from onestill.train.loop import train
from onestill.train.methods.add import Method
from onestill.train.recipe import parse_recipe
from onestill.train.state import TrainState, start_ema
from tests.train.parts import CHANNELS, SIZE, add_method, add_recipe, latents_batch, write_parts
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
    {"feature_network": "tower", "adversarial_space": "pixels", "tower": "pixels", "distillation_space": "pixels"},
]


def placed(parts: Path, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, **({"tower": str(parts / options["tower"])} if "tower" in options else {})}


@pytest.mark.parametrize("options", KINDS)
def test_each_turn_reaches_its_own_network_alone(parts: Path, options: dict[str, Any]) -> None:
    method = add_method(parts, **placed(parts, options))
    turns = Turns(method)
    metrics = method.step(new_state(method), latents_batch(), turns)
    assert turns.reached == {"discriminator": {"discriminator"}, "student": {"student"}}
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())
    for features in method.features:
        inner: Any = getattr(features, "tower", None) or features.denoiser.unet  # type: ignore[attr-defined]
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
    noise, text = torch.randn(2, CHANNELS, SIZE, SIZE), latents_batch(2)["text"]
    with torch.no_grad():
        torch.testing.assert_close(denoiser.x0(noise, s, text), -denoiser.output(noise, s, text))


def test_the_image_condition_is_dropped_where_the_student_saw_nothing(parts: Path) -> None:
    method = add_method(parts, feature_network="both")
    x0 = latents_batch(2)["latents"]
    condition = method._image_condition(x0, torch.tensor([999, 749]))
    assert condition is not None
    assert condition[0].abs().sum() == 0
    assert condition[1].abs().sum() > 0
    kept = add_method(parts, feature_network="both", drop_image_at_terminal=False)
    assert kept._image_condition(x0, torch.tensor([999, 749]))[0].abs().sum() > 0  # type: ignore[index]
    assert add_method(parts, condition_on_image=False)._image_condition(x0, torch.tensor([999, 749])) is None


def test_distillation_is_zero_where_the_teacher_agrees(parts: Path) -> None:
    """A teacher that sees x_theta noised next to nothing returns it: at t = 0 the loss all but vanishes."""
    near = add_method(parts, teacher_low=0, teacher_high=0)
    far = add_method(parts, teacher_low=900, teacher_high=900)
    batch = latents_batch()
    losses = []
    for method in (near, far):
        loss = method._distillation(batch["latents"], batch["text"], torch.Generator().manual_seed(0))
        losses.append(float(loss / method.student_denoiser.signal(torch.tensor([method.options.teacher_low]))[0]))
    assert losses[0] < 0.01 * losses[1]


def test_lambda_scales_the_distillation_alone(parts: Path) -> None:
    made = {}
    for scale in (0.0, 1.0, 2.5):
        method = add_method(parts, lambda_distill=scale)
        turns = Turns(method)
        metrics = method.step(new_state(method), latents_batch(), turns)
        made[scale] = (turns.losses["student"], float(metrics["distill"].detach()))
    assert made[0.0][1] == made[2.5][1]
    assert made[2.5][0] - made[0.0][0] == pytest.approx(2.5 * made[2.5][1], rel=1e-3)
    assert made[1.0][0] - made[0.0][0] == pytest.approx(made[2.5][1], rel=1e-3)


def test_gamma_weighs_r1(parts: Path) -> None:
    losses = {}
    for gamma in (0.0, 3.0):
        method = add_method(parts, gamma_r1=gamma)
        turns = Turns(method)
        metrics = method.step(new_state(method), latents_batch(), turns)
        losses[gamma] = turns.losses["discriminator"]
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * float(metrics["r1"].detach()), rel=1e-3)


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
    drawn = method._student_timesteps(4000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {999, 499}
    assert (drawn == 999).float().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"timestep_weights": [1.0]}, "one number for each"),
        ({"timestep_weights": [0.0] * 4}, "all zero"),
        ({"teacher_low": 900, "teacher_high": 100}, "teacher_low must not be above"),
        ({"feature_low": 900, "feature_high": 100}, "feature_low must not be above"),
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
    pictures, captions = method.sheet(state)
    assert pictures.dtype == "uint8"
    assert pictures.shape == (len(captions), 32, 32, 3)
    assert not (pictures[:16] == pictures[16:]).all()  # one step and four differ
    method.export(state, tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(v, state.ema["student"][n]) for n, v in loaded.state_dict().items())
