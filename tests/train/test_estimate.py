"""The plan of a distillation against what its real step does, counted by torch, at tiny width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from onestill.errors import CheckpointError
from onestill.train.estimate import estimate
from onestill.train.methods.add import Method
from onestill.train.recipe import read_recipe
from onestill.train.state import TrainState
from tests.train.parts import add_recipe, latents_batch, write_parts

ROOT = Path(__file__).parents[2]


class Counter(TorchDispatchMode):
    """torch's formulas, without the module hooks of its own counter, which cannot follow R1's double backward."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize(
    "options",
    [
        {"features__network": "teacher", "distillation__teacher_guidance": 2.0},
        {"features__network": "teacher", "lora_rank": 2, "distillation__weighting": "nfsd"},
        {
            "features__network": "vit",
            "features__vit_layers": [0, 2],
            "features__vit_size": 16,
            "distillation__space": "pixels",
            "features__vit_crop": 0.0,
        },
        {"features__network": "cnn", "features__cnn": "lite0", "features__cnn_size": 32},
        {"features__network": "tower", "features__tower": "latents", "features__tower_layers": [0, 1, 3]},
        {
            "features__network": "both",
            "features__tower": "pixels",
            "features__tower_layers": [0, 2],
            "discriminator_input__space": "pixels",
        },
    ],
)
def test_the_plan_is_what_a_step_does(parts: Path, options: dict[str, Any]) -> None:
    if options["features__network"] == "vit":
        options = {**options, "features__vit": str(parts / "dinov2")}
    if "features__cnn" in options:
        options = {**options, "features__cnn": str(parts / options["features__cnn"])}
    if "features__tower" in options:
        options = {**options, "features__tower": str(parts / options["features__tower"])}
    recipe = add_recipe(parts, **options)
    planned = estimate(recipe, parts / "none")
    assert "left_out" not in planned
    method = Method(recipe.options, recipe.loop)
    method.to(torch.device("cpu"))
    state = TrainState(method.networks, method.optimizers, {}, torch.Generator().manual_seed(0))
    with Counter() as counter:
        for _, loss, _ in method.step(state, latents_batch()):
            loss.backward()  # type: ignore[no-untyped-call]
    # Not in the plan: the heads, and what is 16 tokens here and 77 there.
    assert planned["flops_per_step"] == pytest.approx(counter.total, rel=0.35)
    sizes = {role: sum(p.numel() for p in net.parameters()) for role, net in method.networks.items()}
    trained = sum(p.numel() for p in method.student.parameters() if p.requires_grad)
    assert planned["parameters"]["trained"] == pytest.approx(trained + sizes["discriminator"], rel=0.1)
    assert planned["parameters"]["teacher"] == sum(p.numel() for p in method.teacher.parameters())


def test_sharding_and_adapters_cost_less_memory(parts: Path) -> None:
    whole = estimate(add_recipe(parts, features__network="teacher"), parts, 1)["gigabytes_per_device"]
    recipe = add_recipe(parts, features__network="teacher", lora_rank=2)
    assert estimate(recipe, parts, 1)["gigabytes_per_device"]["players"] < whole["players"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("sd*/*.toml")), ids=lambda path: path.stem)
def test_recipes_of_big_models_are_planned_without_them(path: Path) -> None:
    recipe = read_recipe(path)
    planned = estimate(recipe, path.parent / "model", 8)
    size = {"sdxl": 2_567_463_684, "sd21": 865_910_724}[path.parent.name]  # of the released UNets
    assert planned["parameters"]["teacher"] == size
    # Stable Diffusion XL's UNet at 512 px takes 1.5 TFLOP, Stable Diffusion 2.1's 0.68.
    a_pass = {"sdxl": 1.5e12, "sd21": 0.68e12}[path.parent.name]
    passes = planned["flops_per_step"] / recipe.loop.batch_size / a_pass
    assert 3 < passes < 30
    assert planned["gigabytes_per_device"]["total"] < 141  # an H200


def test_a_students_own_size_is_planned(parts: Path, tmp_path: Path) -> None:
    config = json.loads((parts / "model/unet/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "block_out_channels": [64, 128]}))
    plain = estimate(add_recipe(parts, features__network="teacher"), parts)
    wide = estimate(add_recipe(parts, features__network="teacher", student=str(tmp_path)), parts)
    assert wide["parameters"]["teacher"] == plain["parameters"]["teacher"] == plain["parameters"]["student"]
    assert wide["parameters"]["student"] > 8 * plain["parameters"]["student"]
    assert wide["flops_per_step"] > 3 * plain["flops_per_step"]
    with pytest.raises(CheckpointError, match="holds no config"):
        estimate(add_recipe(parts, features__network="teacher", student="none"), parts)


def test_a_tower_that_is_not_there_is_told(parts: Path) -> None:
    assert "tower and its heads" in estimate(add_recipe(parts, features__tower="none"), parts)["left_out"]


def test_a_plan_needs_configs(parts: Path) -> None:
    with pytest.raises(CheckpointError, match="put the model there"):
        estimate(add_recipe(parts, teacher="none"), parts / "none")
