from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from onestill.errors import RecipeError
from onestill.networks.denoiser import training_schedule
from onestill.train.loop import train
from onestill.train.methods.diffusion import Method, log_snr_weights
from onestill.train.noise import Draw
from onestill.train.optim.muon import (
    COEFFICIENTS,
    SCALE,
    Muon,
    hidden_weights,
    muon_with_adamw,
    newton_schulz,
    orthogonal,
)
from onestill.train.recipe import Recipe, parse_recipe
from onestill.train.state import TrainState
from onestill.train.unet import UNetOptions, build_unet
from tests.tiny import WIDTH, tiny_model
from tests.train.parts import CHANNELS, SIZE, latents_batch
from tests.train.small import rows


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_definition(matrix: Tensor) -> Tensor:
    """Jordan et al.'s loop, one matrix [R, K] at a time."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if len(matrix) > matrix.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


@pytest.mark.parametrize("shape", [(16, 16), (8, 90), (90, 8), (24, 40), (1, 5)])
def test_five_iterations_are_the_definition_and_nearly_orthogonal(shape: tuple[int, int]) -> None:
    matrices = noise(3, *shape)
    made = newton_schulz(matrices)
    for one, whole in zip(made, matrices, strict=True):
        torch.testing.assert_close(one, by_definition(whole), rtol=1e-3, atol=1e-3)
    if shape != (16, 16):  # a square one has singular values so small that five iterations leave them short
        values = torch.linalg.svdvals(made)
        assert 0.65 < float(values.min()) <= float(values.max()) < 1.25
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.mT @ made @ v.mT  # the same directions: only the lengths change
    assert float((turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max()) < 1e-3
    assert s.shape == turned.shape[:2]


def test_matrices_of_no_gradient_stay_nothing() -> None:
    assert newton_schulz(torch.zeros(2, 3, 9)).abs().sum() == 0


def test_a_step_is_momentum_ahead_decay_and_scale() -> None:
    weights = [nn.Parameter(noise(6, 3, 3, 3)), nn.Parameter(noise(5, 7)), nn.Parameter(noise(6, 3, 3, 3, seed=1))]
    weights[0].data = weights[0].data.to(memory_format=torch.channels_last)
    expected, means = [w.detach().clone() for w in weights], [torch.zeros_like(w) for w in weights]
    optimizer = Muon(weights, lr=0.02, momentum=0.9, weight_decay=0.1)
    for turn in range(3):
        for i, weight in enumerate(weights):
            gradient = noise(*weight.shape, seed=10 * turn + i)
            weight.grad = gradient.clone()
            means[i] = 0.9 * means[i] + 0.1 * gradient
            ahead = 0.1 * gradient + 0.9 * means[i]
            made = by_definition(ahead.flatten(1))
            step = SCALE * math.sqrt(max(made.shape)) * made.view(weight.shape)
            expected[i] = expected[i] * (1 - 0.02 * 0.1) - 0.02 * step
        optimizer.step()
    for mine, its in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine.detach(), its, rtol=1e-4, atol=1e-4)


def test_weights_without_a_gradient_stay() -> None:
    weights = [nn.Parameter(noise(4, 4)), nn.Parameter(noise(4, 4, seed=1))]
    before = weights[0].detach().clone()
    weights[1].grad = noise(4, 4)
    Muon(weights, lr=0.1).step()
    assert torch.equal(weights[0], before)
    assert not torch.equal(weights[1], noise(4, 4, seed=1))


def test_alike_matrices_side_by_side_are_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on the CPU: the meta device's kind is not "cpu", so stacking is asked for by hand."""
    tensors = [noise(6, 4, 3, 3, seed=i) for i in range(3)]
    alone = orthogonal(tensors)
    together = newton_schulz(torch.stack([tensor.flatten(1) for tensor in tensors])) * SCALE * 36**0.5
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.flatten(1), other, rtol=1e-4, atol=1e-4)
    calls: list[Sequence[int]] = []

    def seen(matrices: Tensor, iterations: int) -> Tensor:
        calls.append(tuple(matrices.shape))
        return torch.empty_like(matrices)

    monkeypatch.setattr("onestill.train.optim.muon.newton_schulz", seen)
    made = orthogonal([tensor.to("meta") for tensor in (*tensors, noise(2, 5), noise(6, 36))])
    assert calls == [(4, 6, 36), (1, 2, 5)]
    assert [tuple(one.shape) for one in made] == [(6, 4, 3, 3)] * 3 + [(2, 5), (6, 36)]


def test_every_weight_of_a_unet_has_one_optimizer_and_the_right_one() -> None:
    sizes: dict[str, Any] = {"block_out_channels": [16, 32], "head_dim": 8, "groups": 8, "text_width": 32}
    unet = build_unet(UNetOptions(channels=4, text_in_time=True, **sizes))
    unet.mid_block.requires_grad_(False)
    optimizer = muon_with_adamw(unet, muon_lr=5e-3, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    names = {id(p): name for name, p in unet.named_parameters()}
    inner, rest = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert not inner & rest
    assert inner | rest == {name for name, p in unet.named_parameters() if p.requires_grad}
    assert {"conv_in.weight", "conv_out.weight", "add_embedding.pool.positional_embedding"} <= rest
    assert not any(name.endswith("bias") or "norm" in name.split(".")[-2] for name in inner)
    assert {"time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"} <= inner
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 1e-3]
    assert len(hidden_weights(unet)) == len(inner) > 20


class Batches:
    def __init__(self) -> None:
        self.position = 0

    def next(self) -> dict[str, Any]:
        self.position += 1
        return latents_batch(4, seed=self.position)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: Any) -> None:
        self.position = state["position"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("muon") / "model", autoencoder="tiny", openvino=False)


def recipe(model: Path, out: Path, iterations: int, *, parallel: str = "ddp", **options: Any) -> Recipe:
    unet = {"sample_size": SIZE, "channels": CHANNELS, "block_out_channels": [16, 32], "head_dim": 8, "groups": 8}
    given = {"autoencoder": str(model / "vae"), "text_encoder": str(model), "sheet_steps": 1, "optimizer": "muon"}
    given |= {"timesteps": "log_snr", "unet": unet | {"text_width": WIDTH}, **options}
    loop = {"iterations": iterations, "batch_size": 4, "log_every": 1, "checkpoint_every": 1, "warmup": 4}
    loop |= {"keep_checkpoints": 9, "parallel": parallel}
    return parse_recipe({"name": "t", "method": "diffusion", "out": str(out), "loop": loop, "diffusion": given})


def run(model: Path, out: Path, iterations: int, *, resume: bool = False, **options: Any) -> TrainState:
    made = recipe(model, out, iterations, **options)
    return train(made, Method(made.options, made.loop), Batches(), resume=resume)


def test_a_teacher_by_muon_resumes_exactly(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "whole", 4)
    run(model, tmp_path / "parts", 2)
    state = run(model, tmp_path / "parts", 4, resume=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    for name in ("teacher", "teacher.ema", "teacher.optimizer"):
        whole, parts = (
            load_file(tmp_path / r / f"checkpoints/00000004/{name}.safetensors") for r in ("whole", "parts")
        )
        assert whole.keys() == parts.keys()
        assert all(torch.equal(value, parts[key]) for key, value in whole.items()), name
    hidden, rest = state.optimizers["teacher"].param_groups
    # The warm-up's third quarter was the last iteration but one; both rates follow it.
    assert (hidden["lr"], rest["lr"]) == (pytest.approx(5e-3), pytest.approx(5e-4))
    assert (hidden["base_lr"], rest["base_lr"]) == (5e-3, 5e-4)


def test_the_warm_up_scales_both_rates(model: Path, tmp_path: Path) -> None:
    hidden, rest = run(model, tmp_path, 1).optimizers["teacher"].param_groups
    assert (hidden["lr"], rest["lr"]) == (pytest.approx(5e-3 / 4), pytest.approx(5e-4 / 4))


def test_muon_learns_what_adamw_learns(model: Path, tmp_path: Path) -> None:
    """One batch again and again: the error of v falls well below its start."""
    made = recipe(model, tmp_path, 1, muon_lr=0.02)
    method = Method(made.options, made.loop)
    method.to(torch.device("cpu"))
    optimizer, batch, losses = method.optimizers["teacher"], latents_batch(4), list[float]()
    for _ in range(60):  # the same noise each time
        state = TrainState(method.networks, method.optimizers, {}, torch.Generator().manual_seed(0))
        for _, loss, _ in method.step(state, batch):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[:: len(losses) - 1]


def test_muon_and_split_weights_do_not_go_together(model: Path, tmp_path: Path) -> None:
    made = recipe(model, tmp_path, 1, parallel="fsdp")
    with pytest.raises(RecipeError, match=r"muon needs whole matrices.*ddp"):
        Method(made.options, made.loop)


def test_log_snr_is_about_normal_and_every_timestep_is_drawn() -> None:
    schedule = training_schedule()
    weights = log_snr_weights(schedule, -0.5, 2.0)
    assert weights.shape == (1000,)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert float(weights.min()) >= 0.1 / 1000 * (1 - 1e-4)
    alpha, sigma = torch.tensor(schedule.alpha), torch.tensor(schedule.sigma)
    log_snr = (alpha / sigma).square().clamp(min=1e-9).log().clamp(-20, 20)
    for mean, deviation in ((-0.5, 2.0), (2.0, 1.0)):
        chosen = Draw(torch.Generator().manual_seed(0)).choice(log_snr_weights(schedule, mean, deviation), 20_000)
        drawn = log_snr[chosen]
        # Nine tenths are normal; the tenth that is uniform in t has a median of its own.
        assert float(drawn.median()) == pytest.approx(mean, abs=0.25)
        inside = ((drawn - mean).abs() < deviation).float().mean()
        assert float(inside) == pytest.approx(0.683, abs=0.07)


def test_an_error_counts_as_it_is_where_timesteps_are_chosen_by_log_snr(model: Path, tmp_path: Path) -> None:
    metrics = {}
    for kind in ("log_snr", "uniform"):
        made = recipe(model, tmp_path, 1, timesteps=kind)
        method = Method(made.options, made.loop)
        method.to(torch.device("cpu"))
        state = TrainState(method.networks, method.optimizers, {}, torch.Generator().manual_seed(0))
        [(_, _, metrics[kind])] = method.step(state, latents_batch(4))
    assert torch.equal(metrics["log_snr"]["loss"], metrics["log_snr"]["error"])
    assert not torch.equal(metrics["uniform"]["loss"], metrics["uniform"]["error"])
