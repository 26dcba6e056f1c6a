from __future__ import annotations

import dataclasses
import math
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
from onestill.train.methods import ladd
from onestill.train.methods.add import Method
from onestill.train.noise import Draw
from onestill.train.optim.step import Update
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


class Seen:
    """What one step of `method` yields: the losses, and which networks each gives gradients. Nothing is stepped."""

    def __init__(self, method: Method, state: TrainState | None = None, batch: dict[str, Any] | None = None) -> None:
        self.losses, self.metrics, self.reached = dict[str, float](), dict[str, Tensor](), dict[str, set[str]]()
        everything = {**method.networks, "teacher": method.teacher, "decoder": method.space.autoencoder}
        for name, loss, shown in method.step(state or new_state(method), batch or latents_batch()):
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            self.losses[name] = loss.item()
            self.metrics |= {key: value.detach() for key, value in shown.items()}
            self.reached[name] = {role for role, network in everything.items() if _has_gradient(network)}
            for network in everything.values():
                network.zero_grad(set_to_none=True)


def _has_gradient(network: nn.Module) -> bool:
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


KINDS: list[dict[str, Any]] = [
    {"features__network": "both"},
    {"features__network": "tower", "distillation__weighting": "sds", "distillation__teacher_guidance": 3.0},
    {"features__network": "teacher", "heads__condition_on_text": False, "heads__condition_on_image": False},
    {"features__network": "teacher", "features__latents_too": True, "heads__blocks": 2},
    {"features__network": "tower", "discriminator_input__space": "pixels", "features__tower": "pixels",
     "distillation__space": "pixels"},
    {"features__network": "vit", "features__vit_size": 8, "discriminator_input__crop": 2,
     "discriminator_input__augment": ["colour", "translation", "cutout"], "distillation__weighting": "nfsd",
     "distillation__space": "pixels", "adversarial__misaligned": 1.0, "heads__condition_on_image": True},
    {"features__network": "cnn+teacher", "features__cnn": "lite0", "features__latents_too": True,
     "heads__condition_on_level": True},
    {"features__network": "teacher", "distillation__teacher_steps": 3, "heads__condition_on_level": True,
     "gradient_checkpointing": True},
    {"features__network": "teacher", "lora_rank": 2, "frozen_dtype": "bfloat16", "distillation__weighting": "sds",
     "distillation__score_weight": "sigma_squared", "heads__text_encoder": "model"},
]  # fmt: skip


def placed(parts: Path, options: dict[str, Any]) -> dict[str, Any]:
    here = {
        key: str(parts / options[key])
        for key in ("features__tower", "features__cnn", "heads__text_encoder")
        if key in options
    }
    if options["features__network"] == "vit":
        here |= {
            "features__vit": str(parts / "dinov2"),
            "features__vit_layers": [0, 2],
            "features__image_encoder": str(parts / "dinov2"),
        }
        here |= {"features__image_encoder_size": 12}
    return {**options, **here}


@pytest.mark.parametrize("options", KINDS)
def test_each_loss_reaches_its_own_network_alone(parts: Path, options: dict[str, Any]) -> None:
    method = add_method(parts, **placed(parts, options))
    seen = Seen(method)
    assert seen.reached == {"discriminator": {"discriminator"}, "student": {"student"}}
    assert all(torch.isfinite(torch.as_tensor(value)) for value in seen.metrics.values())
    for features in method.inputs.networks:
        if isinstance(features, LatentFeatures):
            continue  # it has no weights
        inner: Any = next(
            getattr(features, name) for name in ("tower", "model", "network", "denoiser") if hasattr(features, name)
        )
        inner = getattr(inner, "unet", inner)
        assert not inner.training
        assert not any(p.requires_grad for p in inner.parameters())
    assert all(p.requires_grad for p in method.discriminator.parameters())


@pytest.mark.parametrize("stepped", ["student", "discriminator"])
def test_a_step_leaves_the_other_network_untouched(parts: Path, stepped: str) -> None:
    method = add_method(parts, features__network="both")
    before = {role: [p.clone() for p in net.parameters()] for role, net in method.networks.items()}
    teacher = [p.clone() for p in method.teacher.parameters()]
    for name, loss, _ in method.step(new_state(method), latents_batch()):
        if name == stepped:
            method.optimizers[name].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            method.optimizers[name].step()
    for role, network in method.networks.items():
        moved = any(not torch.equal(a, b) for a, b in zip(before[role], network.parameters(), strict=True))
        assert moved == (role == stepped)
    assert all(torch.equal(a, b) for a, b in zip(teacher, method.teacher.parameters(), strict=True))


def test_student_and_teacher_share_no_memory(parts: Path) -> None:
    method = add_method(parts, features__network="teacher")
    mine = {p.data_ptr() for p in method.student.parameters()}
    assert not mine & {p.data_ptr() for p in method.teacher.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(method.student.parameters(), method.teacher.parameters(), strict=True))


def test_at_zero_snr_x0_is_minus_v_and_the_image_is_gone(parts: Path) -> None:
    method = add_method(parts, features__network="teacher")
    denoiser = method.student_denoiser
    s = torch.full((2,), 999)
    alpha, sigma = denoiser.signal(s)
    assert alpha.flatten().tolist() == [0.0, 0.0]
    assert sigma.flatten().tolist() == [1.0, 1.0]
    noise, told = torch.randn(2, CHANNELS, SIZE, SIZE), condition(latents_batch(2))
    with torch.no_grad():
        torch.testing.assert_close(denoiser.x0(noise, s, told), -denoiser.output(noise, s, told))


def test_the_image_condition_is_dropped_where_the_student_saw_nothing(parts: Path) -> None:
    method = add_method(parts, features__network="both")
    batch, s = latents_batch(2), torch.tensor([999, 749])

    def image(method: Method) -> Tensor | None:
        transform = method.inputs.draw(batch["latents"], Draw(torch.Generator()))
        return method.head_condition(batch["latents"], s, transform, condition(batch), batch).image

    dropped = image(method)
    assert dropped is not None
    assert dropped[0].abs().sum() == 0
    assert dropped[1].abs().sum() > 0
    kept = image(add_method(parts, features__network="both", heads__drop_image_at_terminal=False))
    assert kept is not None
    assert kept[0].abs().sum() > 0
    assert image(add_method(parts, heads__condition_on_image=False)) is None


def test_distillation_is_zero_where_the_teacher_agrees(parts: Path) -> None:
    """A teacher that sees x_theta noised next to nothing returns it: at t = 0 the loss all but vanishes."""
    near = add_method(parts, distillation__t_low=0, distillation__t_high=0)
    far = add_method(parts, distillation__t_low=900, distillation__t_high=900)
    batch = latents_batch()
    losses = []
    for method in (near, far):
        draw = Draw(torch.Generator().manual_seed(0))
        transform = method.inputs.draw(batch["latents"], draw)
        loss = method.distill(batch["latents"], condition(batch), transform, draw)
        losses.append(
            float(loss / method.student_denoiser.signal(torch.tensor([method.options.distillation.t_low]))[0])
        )
    assert losses[0] < 0.01 * losses[1]


def test_lambda_scales_the_distillation_alone(parts: Path) -> None:
    made = {}
    for scale in (1e-9, 1.0, 2.5):
        method = add_method(parts, distillation__lambda_distill=scale)
        seen = Seen(method)
        made[scale] = (seen.losses["student"], float(seen.metrics["distill"]))
    assert made[1e-9][1] == made[2.5][1]
    assert made[2.5][0] - made[1e-9][0] == pytest.approx(2.5 * made[2.5][1], rel=1e-3)
    assert made[1.0][0] - made[1e-9][0] == pytest.approx(made[2.5][1], rel=1e-3)


def test_gamma_weighs_r1(parts: Path) -> None:
    losses = {}
    for gamma in (0.0, 3.0):
        method = add_method(parts, adversarial__gamma_r1=gamma)
        seen = Seen(method)
        losses[gamma] = seen.losses["discriminator"]
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * float(seen.metrics["r1"]), rel=1e-3)


def test_several_teacher_steps_walk_down_the_teachers_path(parts: Path) -> None:
    """From t in equal steps: the same as the sampler's DDIM over those timesteps."""
    method = add_method(parts, distillation__teacher_steps=4, distillation__teacher_guidance=2.0)
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
    method = add_method(
        parts,
        distillation__weighting="nfsd",
        distillation__nfsd_guidance=5.0,
        distillation__score_weight="sigma_squared",
    )
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


def test_the_page_compares_ladds_noise_with_the_papers() -> None:
    """The numbers that docs/distil.md gives are those of the schedule."""
    alphas = scaled_linear_alphas_cumprod()
    schedule, page = NoiseSchedule(alphas), (Path(__file__).parents[3] / "docs/distil.md").read_text(encoding="utf-8")
    page = " ".join(page.split())
    ours, papers = [], []
    for n in (-1, 0, 1, 2):
        alpha, sigma = schedule.at(round(999 / (1 + math.exp(-n))))
        ours.append(f"{sigma / alpha:.2g}")
        papers.append(f"{math.exp(n):.2g}")
    assert f"at n = -1, 0, 1, 2 is {', '.join(ours)}, where the paper has {', '.join(papers)}" in page


@pytest.mark.parametrize("t", [60, 700])
def test_nfsds_gradient_is_the_same_where_pixels_are_asked_for(parts: Path, t: int) -> None:
    """Its target is no image: decoded, the gradient was another one, of a tenth of the size."""
    found = {}
    for space in ("latents", "pixels"):
        options = {"distillation__weighting": "nfsd", "distillation__t_low": t, "distillation__t_high": t}
        method = add_method(parts, **options, distillation__space=space)
        batch, draw = latents_batch(4), Draw(torch.Generator().manual_seed(0))
        x_theta = batch["latents"].clone().requires_grad_()
        method.distill(x_theta, condition(batch), method.inputs.draw(x_theta, draw), draw).backward()
        found[space] = x_theta.grad
    torch.testing.assert_close(found["pixels"], found["latents"])


@pytest.mark.parametrize("first", [0, 5])
def test_the_student_warms_up_from_its_first_step(parts: Path, first: int) -> None:
    """Its learning rate and its running mean; the heads' learning rate from the run's."""
    method = add_method(parts, adversarial__heads_first=first, lr=1e-3, heads__lr=1e-3)
    ema = {"student": start_ema(method.student)}
    state = TrainState(method.networks, method.optimizers, ema, torch.Generator().manual_seed(0))
    loop = dataclasses.replace(method.loop, warmup=4)
    rates: dict[str, list[float]] = {"student": [], "discriminator": []}
    for state.iteration in range(first + 3):
        update = Update(state, loop)
        for name, loss, _ in method.step(state, latents_batch(4)):
            update(name, loss)
            rates[name].append(method.optimizers[name].param_groups[0]["lr"])
    assert rates["student"] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3])
    assert rates["discriminator"] == pytest.approx([1e-3 * min(1, (i + 1) / 4) for i in range(first + 3)])
    state.iteration = first + 1
    state.update_ema(0.999)  # (1 + 1) / (10 + 1) of the old mean, whenever it began
    name, mean = next(iter(state.ema["student"].items()))
    old, now = start_ema(add_method(parts).student)[name], method.student.state_dict()[name]
    torch.testing.assert_close(mean, old + (1 - 2 / 11) * (now - old))


def test_ladds_practice_on_little_noise_begins_with_the_student(parts: Path) -> None:
    tables = dataclasses.asdict(add_recipe(parts, features__network="teacher", adversarial__heads_first=500).options)
    given = {key: tables[key] for key in ("teacher", "autoencoder", "text_encoder", "adversarial")}
    recipe = parse_recipe({"name": "a", "method": "ladd", "out": "a", "ladd": {**given, "heads": {"width": 16}}})
    method = ladd.Method(recipe.options, recipe.loop)
    state = TrainState(method.networks, method.optimizers, {}, torch.Generator())
    given = recipe.options.student_input
    for state.iteration, expected in ((499, given.warm_weights), (999, given.warm_weights), (1000, given.weights)):
        assert method.timestep_weights(state) == expected


def test_a_tower_of_squares_says_so(parts: Path) -> None:
    method = add_method(parts)
    batch = latents_batch(4) | {"latents": torch.randn(4, 4, 4, 8)}
    state = TrainState(method.networks, method.optimizers, {}, torch.Generator())
    with pytest.raises(RecipeError, match=r"squares of 4 and is shown 4 x 8: cut such windows"):
        next(method.step(state, batch))


def test_the_students_input_is_pure_noise_at_the_end_and_a_noised_image_before(parts: Path) -> None:
    x0, s = latents_batch(2)["latents"], torch.tensor([999, 499])
    made = {}
    for kind in ("pure", "schedule"):
        method = add_method(parts, student_input__terminal_noise=kind)
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
    method = add_method(parts, adversarial__misaligned=1.0)
    batch = latents_batch()
    real = method.inputs.draw(batch["latents"], Draw(torch.Generator())).features(batch["latents"], condition(batch))
    c = HeadCondition(condition(batch).embedding, method.inputs.embed(batch["latents"]))
    assert float(method.misaligned(real, c, batch).detach()) == 0  # one caption for all
    batch["captions"] = ["a", "a", "b", "b"]  # rows 0 and 2 follow a row with another caption
    method.discriminator.eval()
    logits = method.discriminator(real, HeadCondition(c.text.roll(1, 0), c.image))  # type: ignore[union-attr]
    expected = sum(torch.relu(1 + one[[0, 2]]).mean() for one in logits)
    torch.testing.assert_close(method.misaligned(real, c, batch), expected)


@pytest.mark.parametrize(
    ("options", "plays"), [({"adversarial__student_every": 2}, [1, 0, 1]), ({"adversarial__heads_first": 2}, [0, 0, 1])]
)
def test_the_student_steps_when_it_is_to(parts: Path, options: dict[str, int], plays: list[int]) -> None:
    method = add_method(parts, **options)
    state, stepped = new_state(method), []
    for state.iteration in range(3):
        stepped.append(sorted(Seen(method, state).losses))
    assert stepped == [["discriminator", "student"] if it else ["discriminator"] for it in plays]


def test_without_gamma_r1_is_not_computed(parts: Path) -> None:
    penalty = {
        gamma: float(Seen(add_method(parts, adversarial__gamma_r1=gamma)).metrics["r1"]) for gamma in (0.0, 1e-5)
    }
    assert penalty[0.0] == 0 < penalty[1e-5]


def test_all_noise_comes_from_the_states_generator(parts: Path) -> None:
    losses = []
    for seed, elsewhere in ((1, 0), (1, 9), (2, 0)):
        method = add_method(parts, features__network="both", distillation__teacher_guidance=2.0)
        torch.manual_seed(elsewhere)
        losses.append(Seen(method, new_state(method, seed)).losses)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_student_timesteps_follow_their_weights(parts: Path) -> None:
    method = add_method(parts, student_input__timesteps=[999, 499], student_input__weights=[3.0, 1.0])
    drawn = method.student_timesteps(4000, new_state(method))
    assert set(drawn.tolist()) == {999, 499}
    assert (drawn == 999).float().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"student_input__weights": [1.0]}, "one number for each"),
        ({"student_input__weights": [0.0] * 4}, "all zero"),
        ({"distillation__t_low": 900, "distillation__t_high": 100}, "t_low must not be above"),
        ({"discriminator_input__t_low": 900, "discriminator_input__t_high": 100}, "t_low must not be above"),
        ({"distillation__weighting": "nfsd", "distillation__teacher_steps": 2}, "takes one teacher step"),
        ({"distillation__weighting": "sds", "distillation__t_high": 999}, "alpha, which is 0"),
        ({"adversarial__misaligned": 1.0, "heads__condition_on_text": False}, "need heads.condition_on_text"),
        ({"heads__condition_on_level": True}, "needs the teacher's features"),
        ({"discriminator_input__augment": ["blur"]}, "may list colour"),
        ({"discriminator_input__augment": ["colour"]}, "colour of latents"),
        ({"features__network": "vit"}, "name its folder"),
        ({"features__network": "teacher", "shard_teacher": True}, "read block by block"),
    ],
)
def test_options_that_contradict_each_other(parts: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        add_method(parts, **options)


def test_networks_that_are_not_there(parts: Path) -> None:
    for key, sentence in (
        ("teacher", "UNet2DCond"),
        ("autoencoder", "AutoencoderTiny"),
        ("features__tower", "no contrastive"),
    ):
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
        given = dataclasses.asdict(add_recipe(parts, features__network="both", lr=1e-3).options)
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

    method = add_method(parts, features__network="teacher")
    state = new_state(method)
    pictures, captions, numbers = method.sheet(state)
    assert pictures.dtype == "uint8"
    assert pictures.shape == (len(captions), 32, 32, 3)
    assert not (pictures[:16] == pictures[16:32]).all()  # one step and four differ
    assert numbers["steps_4_to_1"] > 0
    assert captions[32:] == []
    Seen(method, state)
    pictures, captions, _ = method.sheet(state)
    assert captions[32:36] == ["from 999"] * 4  # what it makes of the batch, at each student timestep
    assert captions[-4:] == ["from 249"] * 4
    assert len(pictures) == len(captions) == 32 + 16
    assert method.student.training
    method.export(state, tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(v, state.ema["student"][n]) for n, v in loaded.state_dict().items())
