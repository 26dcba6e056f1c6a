"""On a GPU a training step asks the GPU for nothing, so that it is given the next work before it is out of work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onestill.train import loop
from onestill.train.batches import SampleBatches, to_device
from onestill.train.methods import add, diffusion, ladd, lcm
from onestill.train.noise import Draw, Part, generators, restore, table
from onestill.train.optim.muon import Muon, Together, muon_with_adamw
from onestill.train.optim.step import Skipped, Update, decides_itself, optimize
from onestill.train.recipe import LoopOptions, parse_recipe
from onestill.train.runtime import parallel
from onestill.train.state import TrainState, start_ema
from tests.tiny import WIDTH
from tests.train.methods.test_add import KINDS, placed
from tests.train.parts import CHANNELS, SIZE, latents_batch, nested, write_parts
from tests.train.small import NoiseBatches, rows, small_train

METHODS: dict[str, Any] = {"add": add, "ladd": ladd, "lcm": lcm, "diffusion": diffusion}
AWAY = torch.device("meta")  # tensors there have no numbers: whatever reads one fails, as a GPU would be waited for


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_parts(tmp_path_factory.mktemp("parts"))


@torch.no_grad()
def moved_by_gradients(optimizer: torch.optim.Optimizer) -> None:
    """In AdamW's place, whose one fused kernel is for devices that exist."""
    for group in optimizer.param_groups:
        weights = [p for p in group["params"] if p.grad is not None]
        torch._foreach_add_(weights, [p.grad for p in weights], alpha=-group["lr"])


class Waiting(AssertionError):
    """An operation for which a GPU would be waited for."""


class NeverWaiting(TorchDispatchMode):
    """Raises Waiting at the first operation that reads numbers back, or copies between devices and waits for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors(args, kwargs)
        away = any(one.device == AWAY for one in given)
        reads = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        if func.overloadpacket in INDEXING:
            reads = any(one.dtype == torch.bool for one in tensors(args[1]))
        if away and reads:
            raise Waiting(f"{func} reads numbers")
        if away and func.overloadpacket not in COPIES and any(one.device != AWAY and one.ndim for one in given):
            raise Waiting(f"{func} mixes devices")
        found = func(*args, **kwargs)
        devices = {one.device for one in (*given, *tensors(found)) if one.ndim or func.overloadpacket in COPIES}
        blocking = not kwargs.get("non_blocking") and not any(arg is True for arg in args)
        if func.overloadpacket in COPIES and len(devices) > 1 and (blocking or found.device != AWAY):
            raise Waiting(f"{func} copies between devices and waits")
        return found


INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.copy)


def tensors(*tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


class AwayState(TrainState):
    """Draws on the device, as a state on a GPU does."""

    @property
    def draw(self) -> Draw:
        return Draw(self.generator, self.part, self.host, AWAY)


def made(name: str, parts: Path, **options: Any) -> tuple[Any, Any]:
    """A method on the pretended device, with its recipe."""
    model = parts / "model"
    given: dict[str, Any] = {"autoencoder": str(model / "vae"), "text_encoder": str(model), **options}
    if name == "diffusion":
        sizes = {"block_out_channels": [16, 32], "head_dim": 8, "groups": 8, "text_width": WIDTH}
        given |= {"unet": {"sample_size": SIZE, "channels": CHANNELS, **sizes}}
    else:
        given["teacher"] = str(model / "unet")
    recipe = parse_recipe(
        {"name": "t", "method": name, "out": "t", "loop": {"iterations": 9, "batch_size": 4}, name: nested(given)}
    )
    method = METHODS[name].Method(recipe.options, recipe.loop)
    before = {role: dict(network.named_parameters()) for role, network in method.networks.items()}
    method.to(AWAY)
    for role, network in method.networks.items():
        parallel.repoint(method.optimizers.values(), before[role], network)
    return method, recipe


CASES = [("add", options) for options in KINDS if "heads__text_encoder" not in options]
CASES += [
    ("ladd", {"heads__width": 16, "student_input__warm_iterations": 2}),
    ("lcm", {}),
    ("lcm", {"target": "average"}),
]
CASES += [("diffusion", {}), ("diffusion", {"timesteps": "log_snr", "optimizer": "muon"})]
CASES += [
    (
        "add",
        {
            "features__network": "teacher",
            "adversarial__misaligned": 1.0,
            "adversarial__gamma_r1": 0.0,
            "distillation__teacher_guidance": 2.0,
        },
    )
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_step_asks_the_device_for_nothing(
    parts: Path, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", moved_by_gradients)
    if name == "add":
        options = {
            "features__tower": str(parts / "latents"),
            "features__tower_layers": [0, 1, 3],
            "heads__width": 16,
            **placed(parts, options),
        }
    method, recipe = made(name, parts, **options)
    ema = {role: start_ema(method.networks[role]) for role in method.averaged}
    host = torch.Generator().manual_seed(0)
    state = AwayState(method.networks, method.optimizers, ema, torch.Generator(), host=host)
    batch = {**latents_batch(), "captions": ["a", "a", "b", "b"]}

    def iteration(on: Any) -> None:
        with on:
            moved = to_device(batch, AWAY)
            update = Update(state, recipe.loop, on_device=True)
            metrics = optimize(method.step, state, moved, update, lambda: torch.autocast("cpu", enabled=False))
            state.iteration += 1
            state.update_ema(0.9)
            Skipped().add(update.bad)
        assert all(value.device == AWAY for value in (*metrics.values(), *update.norms.values()) if value.ndim)

    iteration(torch.enable_grad())  # tables go to the device once
    iteration(NeverWaiting())


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x + torch.ones(3, device=x.device).to("cpu"),
        lambda x: x.nonzero(),
    ],
)
def test_what_waits_is_seen(waits: Any) -> None:
    x = torch.ones(3, device=AWAY)
    with NeverWaiting(), pytest.raises((Waiting, RuntimeError, NotImplementedError)):
        waits(x)
    with NeverWaiting():
        torch.ones(3).to(x.device, non_blocking=True) + x * torch.zeros(()) + x[torch.zeros(3, device=AWAY).long()]


def test_a_gpu_may_use_its_faster_arithmetic_and_a_cpu_is_left_alone() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        loop._allow_tf32(torch.device("cpu"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before
        loop._allow_tf32(torch.device("cuda"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


class Gradients:
    """A network with its optimizer, given gradients by hand; the second of three is none."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6))
        weights = self.network.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(weights, lr=0.1, betas=(0.5, 0.99), fused=True)
            if kind == "adamw"
            else muon_with_adamw(self.network, muon_lr=0.1, lr=0.1, betas=(0.5, 0.99), weight_decay=0.1)
        )
        self.state = TrainState({"net": self.network}, {"net": self.optimizer}, {}, torch.Generator())

    def run(self, on_device: bool, spoiled: tuple[int, ...] = (1,), turns: int = 3) -> list[bool | Tensor]:
        options, bad = LoopOptions(warmup=0, grad_clip=0.5), []
        for turn in range(turns):
            draw, loss = torch.Generator().manual_seed(turn), torch.zeros(())
            for p in self.network.parameters():
                gradient = torch.randn(p.shape, generator=draw)
                loss = loss + (gradient * p).sum()
            update = Update(self.state, options, on_device=on_device)
            update("net", loss * float("nan") if turn in spoiled else loss)
            bad.append(update.bad)
        return bad


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_the_device_skips_changes_nothing(kind: str) -> None:
    """The device's decision is the host's: weights, moments and counted steps."""
    asked, alone = Gradients(kind), Gradients(kind)
    assert decides_itself(alone.optimizer)
    assert asked.run(False) == [False, True, False]
    assert [bool(bad) for bad in alone.run(True)] == [False, True, False]
    for mine, its in zip(asked.network.parameters(), alone.network.parameters(), strict=True):
        assert torch.isfinite(its).all()
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
        for key, value in asked.optimizer.state[mine].items():
            torch.testing.assert_close(alone.optimizer.state[its][key], value, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_cannot_skip_is_asked_for() -> None:
    weights = [nn.Parameter(torch.zeros(2, 2))]
    assert not decides_itself(torch.optim.SGD(weights))
    assert not decides_itself(torch.optim.AdamW(weights))
    assert decides_itself(torch.optim.AdamW(weights, fused=True))
    assert decides_itself(Together(Muon(weights)))


def test_skipped_steps_are_counted_when_somebody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_on_device", lambda device, state, options: True)
    spoiled, seldom = NoiseBatches(spoiled=lambda i: i in (1, 2, 4)), {"log_every": 8, "checkpoint_every": 100}
    assert small_train(tmp_path / "a", 6, spoiled, log_every=3, checkpoint_every=100).bad_steps == 3
    assert [row["bad_steps"] for row in rows(tmp_path / "a")] == [2, 3]
    with pytest.raises(loop.TrainingStoppedError, match="4 steps in a row"):
        small_train(tmp_path / "b", 20, NoiseBatches(spoiled=lambda i: 1 < i < 6), max_bad_steps=4, **seldom)
    assert json.loads((tmp_path / "b/metrics.jsonl").read_text())["bad_steps"] == 4


def test_a_row_of_skipped_steps_may_begin_before_the_last_question() -> None:
    state, skipped = TrainState({}, {}, {}, torch.Generator()), Skipped()
    for bad in (False, True, True):
        skipped.add(torch.tensor(bad))
    assert not skipped.known
    assert (skipped.ask(state), state.bad_steps) == (2, 2)
    for bad in (True, False, True):
        skipped.add(torch.tensor(bad))
    assert (skipped.ask(state), state.bad_steps) == (3, 4)
    skipped.add(True)
    assert skipped.known
    assert (skipped.ask(state), state.bad_steps) == (2, 5)


def test_a_gpus_choices_in_python_come_from_the_cpu() -> None:
    noise, host = generators(torch.device("cpu"), 3)
    assert noise is host
    two = Draw(torch.Generator().manual_seed(1), Part(), torch.Generator().manual_seed(2))
    two.normal(4)
    assert two.shared(0, 99, 5) == Draw(torch.Generator().manual_seed(2)).shared(0, 99, 5)
    assert table((3, 4), torch.device("cpu")) is table((3, 4), torch.device("cpu"))


def test_a_checkpoint_of_another_device_goes_on_with_other_noise() -> None:
    saved = torch.arange(16, dtype=torch.uint8)  # as long as a GPU's state
    drawn = []
    for state in (saved, saved, saved + 1):
        generator = torch.Generator().manual_seed(0)
        restore(generator, state)
        drawn.append(torch.rand(3, generator=generator).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    one, other = torch.Generator().manual_seed(5), torch.Generator()
    restore(other, one.get_state())
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))


def test_batches_are_pinned_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU to pin for: what is asked is that the thread that reads asks for it."""
    asked: list[int] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: asked.append(len(self)) or self)

    class Reader:
        def __iter__(self) -> Any:
            return iter(range(100))

        def state(self) -> dict[str, Any]:
            return {}

        def load_state(self, state: Any) -> None: ...

    def collate(samples: Any) -> dict[str, Any]:
        return {"x": torch.tensor(samples), "captions": ["a"]}

    SampleBatches(Reader(), collate, 3, prefetch=0).next()
    assert asked == []
    SampleBatches(Reader(), collate, 3, prefetch=0, pin=True).next()
    assert asked == [3]
