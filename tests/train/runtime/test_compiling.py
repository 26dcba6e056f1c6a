"""Compiled training is eager training: the same weights, the same names, and a run goes on in either form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onestill.train.discriminator.cnn import CNNFeatures
from onestill.train.loop import train
from onestill.train.methods import add, diffusion, ladd, lcm
from onestill.train.recipe import LoopOptions, parse_recipe
from onestill.train.runtime import compiling
from onestill.train.runtime.compiling import graphs
from onestill.train.state import TrainState
from tests.tiny import WIDTH
from tests.train.parts import CHANNELS, SIZE, nested, write_parts
from tests.train.worlds import PartBatches

# Dynamo looks at attributes that warn, and hides the warnings by a filter that "error" comes before.
pytestmark = pytest.mark.filterwarnings("default")

METHODS: dict[str, Any] = {"add": add, "ladd": ladd, "lcm": lcm, "diffusion": diffusion}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(
    parts: Path,
    out: Path,
    name: str,
    iterations: int,
    *,
    compile: bool,
    resume: bool = False,
    device: str = "cpu",
    **options: Any,
) -> TrainState:
    model = parts / "model"
    given: dict[str, Any] = {"autoencoder": str(model / "vae"), "text_encoder": str(model), **options}
    if name == "diffusion":
        sizes = {"block_out_channels": [16, 32], "head_dim": 8, "groups": 8, "text_width": WIDTH}
        given |= {"unet": {"sample_size": SIZE, "channels": CHANNELS, **sizes}, "sheet_steps": 1}
    else:
        given |= {"teacher": str(model / "unet"), "sheet_prompts": ["a red star"]}
    often = {"log_every": 1, "sheet_every": 99, "checkpoint_every": 1, "keep_checkpoints": 9, "warmup": 0, "seed": 2}
    table = {"iterations": iterations, "batch_size": 8, "compile": compile, "device": device, **often}
    recipe = parse_recipe({"name": "t", "method": name, "out": str(out), "loop": table, name: nested(given)})
    method = METHODS[name].Method(recipe.options, recipe.loop)
    return train(recipe, method, PartBatches((0, 1)), resume=resume)


def check_alike(one: Path, other: Path, iteration: int) -> None:
    folders = [out / f"checkpoints/{iteration:08d}" for out in (one, other)]
    assert sorted(p.name for p in folders[0].iterdir()) == sorted(p.name for p in folders[1].iterdir())
    for file in folders[0].glob("*.safetensors"):
        mine, its = (load_file(folder / file.name) for folder in folders)
        assert mine.keys() == its.keys()
        assert not any("_orig_mod" in name for name in mine)
        for name, value in mine.items():
            torch.testing.assert_close(its[name], value, rtol=1e-3, atol=1e-3, msg=f"{file.name} {name}")


TEACHER = {
    "features__network": "teacher",
    "features__latents_too": True,
    "distillation__teacher_guidance": 2.0,
    "heads__condition_on_level": True,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "add": ("add", {**TEACHER, "heads__width": 16, "adversarial__misaligned": 1.0}),
    "add without R1, heads first": (
        "add",
        {**TEACHER, "heads__width": 16, "adversarial__gamma_r1": 0.0, "adversarial__heads_first": 1},
    ),
    "lcm": ("lcm", {"target": "average"}),
    "diffusion": ("diffusion", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_steps_are_the_eager_ones_and_a_run_goes_on_in_either(parts: Path, tmp_path: Path, case: str) -> None:
    """By dynamo and AOT autograd, whose graphs a GPU records."""
    name, options = CASES[case]
    run(parts, tmp_path / "eager", name, 3, compile=False, **options)
    run(parts, tmp_path / "compiled", name, 2, compile=True, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= (1 if name == "diffusion" else 3)
    check_alike(tmp_path / "eager", tmp_path / "compiled", 2)
    run(parts, tmp_path / "compiled", name, 3, compile=False, resume=True, **options)
    check_alike(tmp_path / "eager", tmp_path / "compiled", 3)


def test_a_cnn_is_compiled_with_its_hooks(parts: Path) -> None:
    features = CNNFeatures(parts / "lite0", ("stages.1", "stages.2"))
    fast = compiling.compiled(features.features, LoopOptions(compile=True), torch.device("cpu"))
    for seed in (0, 1):
        x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        gradients = []
        for see in (features.features, fast):
            shown = x.clone().requires_grad_()
            found = see(shown)
            sum(one.square().sum() for one in found).backward()  # type: ignore[union-attr]
            gradients.append((shown.grad, *found))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_graphs_train_as_eager_does(parts: Path, tmp_path: Path, case: str) -> None:
    name, options = CASES[case]
    for out, on in (("eager", False), ("graphs", True)):
        run(parts, tmp_path / out, name, 3, compile=on, device="cuda", **options)
    for kind in ("student", "teacher"):
        file = f"checkpoints/00000003/{kind}.safetensors"
        if (tmp_path / "eager" / file).is_file():
            mine, its = (load_file(tmp_path / out / file) for out in ("eager", "graphs"))
            for key, value in mine.items():
                torch.testing.assert_close(its[key], value, rtol=1e-2, atol=2e-3, msg=key)


def test_a_sheet_and_what_it_samples_are_not_compiled_for(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = diffusion.copy_with_weights

    def noted(*arguments: Any) -> Any:
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return real(*arguments)

    monkeypatch.setattr(diffusion, "copy_with_weights", noted)
    run(parts, tmp_path, "diffusion", 1, compile=True)
    assert seen[0] == seen[-1] == torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_graphs_are_for_gpus_whose_weights_stay_where_they_are() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert graphs(LoopOptions(), cuda)
    assert not graphs(LoopOptions(parallel="fsdp"), cuda)
    assert not graphs(LoopOptions(), cpu)


def test_without_compile_nothing_is_compiled() -> None:
    network = torch.nn.Linear(2, 2)
    assert compiling.compiled(network, LoopOptions(), torch.device("cpu")) is network
    made = compiling.compiled(network, LoopOptions(compile=True), torch.device("cpu"))
    assert made is not network
    assert dataclasses.asdict(LoopOptions(compile=True))["compile"]
