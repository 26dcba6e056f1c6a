"""One process, two with everything each, two with everything split: the same weights after three steps of both."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onestill.errors import RecipeError
from onestill.train.loop import train
from onestill.train.methods.add import Method
from onestill.train.methods.autoencoder import Method as AutoencoderMethod
from onestill.train.optim.step import Update, optimize, rows_at_once
from onestill.train.recipe import LoopOptions
from onestill.train.state import TrainState, checkpoints
from tests.train.parts import latents_batch, write_parts
from tests.train.small import NoiseBatches, rows, small_recipe
from tests.train.worlds import BATCH, CAPTIONS, ITERATIONS, world_recipe, world_train

LAST = f"checkpoints/{ITERATIONS:08d}"
FILES = ("student", "student.ema", "discriminator", "student.optimizer", "discriminator.optimizer")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def runs(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`alone`, and `ddp` and `fsdp` by two processes that are started as a launcher starts them."""
    out = tmp_path_factory.mktemp("worlds")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.train.worlds", str(parts), str(out), "ddp", "fsdp"]
    processes = [
        subprocess.Popen(command, env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    world_train(parts, out / "alone")
    for process in processes:
        said = process.communicate(timeout=600)[1].decode()
        assert process.returncode == 0, said[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("file", FILES)
def test_two_processes_give_the_single_ones_weights(runs: Path, kind: str, file: str) -> None:
    alone, together = (load_file(runs / run / LAST / f"{file}.safetensors") for run in ("alone", kind))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-4, msg=f"{file} {name}")


@pytest.mark.slow
def test_the_weights_have_moved_further_than_that(runs: Path) -> None:
    first, last = (load_file(runs / "alone/checkpoints" / i / "student.safetensors") for i in ("00000001", LAST[-8:]))
    assert max(float((last[name] - first[name]).abs().max()) for name in first) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_log_is_of_all_processes(runs: Path, kind: str) -> None:
    for mine, whole in zip(rows(runs / kind), rows(runs / "alone"), strict=True):
        assert mine.keys() == whole.keys()
        assert all(mine[key] == pytest.approx(whole[key], rel=0.01, abs=0.01) for key in mine)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_stopped(runs: Path, parts: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(runs / kind / "checkpoints/00000002", tmp_path / "checkpoints/00000002")
    state = world_train(parts, tmp_path, resume=True)
    assert (state.iteration, state.data) == (ITERATIONS, {"position": ITERATIONS})
    assert checkpoints(tmp_path / "checkpoints")[-1].name == LAST[-8:]
    alone, resumed = (load_file(run / LAST / "student.safetensors") for run in (runs / "alone", tmp_path))
    for name, value in alone.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-4, msg=name)


Tensors = dict[str, torch.Tensor]


def one_iteration(parts: Path, accumulate: int) -> tuple[Tensors, Tensors, Tensors]:
    """Weights, gradient norms and the log's numbers after one iteration on eight samples."""
    recipe = world_recipe(parts, parts / "unused", accumulate=accumulate)
    method = Method(recipe.options, recipe.loop)
    method.to(torch.device("cpu"))
    state = TrainState(method.networks, method.optimizers, {}, torch.Generator().manual_seed(0))
    update = Update(state, recipe.loop)
    metrics = optimize(method.step, state, latents_batch(BATCH) | {"captions": CAPTIONS}, update, nullcontext)
    assert metrics.keys() >= {"hinge", "adversarial", "distill"}
    weights = {f"{role}.{n}": p.detach() for role, net in state.networks.items() for n, p in net.named_parameters()}
    weights |= {f"{role}.{n}": b.clone() for role, net in state.networks.items() for n, b in net.named_buffers()}
    return weights, update.norms, metrics


def test_passes_over_parts_are_one_pass_over_the_batch(parts: Path) -> None:
    """The student answers the discriminator's whole update, however many passes there are."""
    whole, norms, metrics = one_iteration(parts, 1)
    assert metrics.keys() >= {"hinge", "misaligned", "r1"}
    for accumulate in (2, 4):
        weights, found, logged = one_iteration(parts, accumulate)
        for name, value in metrics.items():
            torch.testing.assert_close(logged[name], value, rtol=1e-5, atol=1e-5, msg=name)
        for name, norm in norms.items():
            torch.testing.assert_close(found[name], norm, rtol=1e-4, atol=0, msg=name)
        # Adam's first step is the gradient's sign: where that is all rounding, a few weights go the other way.
        off = sum(int(((weights[name] - value).abs() > 1e-4).sum()) for name, value in whole.items())
        assert off < 1e-3 * sum(value.numel() for value in whole.values())


def test_an_optimizer_without_a_loss_is_not_stepped(tmp_path: Path) -> None:
    """The autoencoder's patch discriminator joins late: until then the step yields one loss."""
    recipe = small_recipe(tmp_path, 4, accumulate=2, batch_size=4)
    batches = NoiseBatches()
    batches.next = lambda: {"images": torch.rand(4, 3, 8, 8) * 2 - 1, "captions": [""] * 4}  # type: ignore[method-assign]
    state = train(recipe, AutoencoderMethod(recipe.options, recipe.loop), batches)
    assert state.bad_steps == 0
    assert [("grad_norm/discriminator" in row) for row in rows(tmp_path)] == [False, False, True, True]


def test_batches_that_cannot_be_divided() -> None:
    assert rows_at_once(LoopOptions(batch_size=8, accumulate=2), 2) == 2
    with pytest.raises(RecipeError, match="not divisible by 3 process"):
        rows_at_once(LoopOptions(batch_size=8), 3)
    with pytest.raises(RecipeError, match=r"one sample of 8.*at least two"):
        rows_at_once(LoopOptions(batch_size=8, accumulate=2), 4)
    with pytest.raises(RecipeError, match=r"one sample of 1.*at least two"):
        rows_at_once(LoopOptions(batch_size=1), 1)


def test_networks_that_are_not_called_by_their_forward_are_not_split(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, 1, parallel="fsdp")
    with pytest.raises(RecipeError, match=r"autoencoder does not split.*ddp"):
        train(recipe, AutoencoderMethod(recipe.options, recipe.loop), NoiseBatches())
