"""Train one recipe: read it, build its method, wire its data, run the loop."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from onestill.engine.device import checked_name
from onestill.errors import DataError
from onestill.networks.denoiser import unet_folder
from onestill.train.batches import COLLATE, Reader, SampleBatches
from onestill.train.estimate import estimate
from onestill.train.loop import train
from onestill.train.methods.distiller import DistilOptions
from onestill.train.optim.step import rows_at_once
from onestill.train.recipe import DataOptions, Recipe, read_recipe
from onestill.train.runtime import parallel
from onestill.train.state import TrainState


def train_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    reader: Callable[[DataOptions, tuple[int, int]], Reader],
    resume: bool = False,
    dry_run: bool = False,
    devices: int = 0,
    say: Callable[[str], Any] = print,
) -> TrainState | None:
    """Train what the recipe at `path` describes.

    Args:
        overrides: `KEY=VALUE` settings that replace the recipe's.
        reader: opens the part (i, n) of the data that `[data]` names, every n-th sample from i on; given by the
            caller, since training knows no file format.
        dry_run: read and check everything, build the networks, print the resolved recipe, their sizes and, for a
            distillation, what it will cost on so many `devices` (0: as many as there are processes); stop. Under
            `missing` it says what keeps the data from being read.
    """
    recipe = read_recipe(path, overrides)
    transformers.utils.logging.disable_progress_bar()  # it would tear the line that shows the training
    diffusers.utils.logging.set_verbosity_error()
    if recipe.loop.threads:
        torch.set_num_threads(recipe.loop.threads)
    checked_name(recipe.loop.device)  # of a dry run too, on a machine without the device
    parallel.start(recipe.loop.device)
    rank, world = parallel.rank(), parallel.world()
    rows = rows_at_once(recipe.loop, world) * recipe.loop.accumulate
    if dry_run:
        plan = _plan(recipe, path.parent, devices or world)
        try:
            reader(recipe.data, (rank, world))
        except DataError as error:  # a plan may be older than its data
            plan["missing"] = str(error)
        say(printed(plan))
        return None
    module = importlib.import_module(f"onestill.train.methods.{recipe.method}")
    method = module.Method(recipe.options, recipe.loop)
    samples = reader(recipe.data, (rank, world))
    pin = recipe.loop.device.startswith("cuda")
    batches = SampleBatches(samples, COLLATE[method.batch], rows, recipe.data.prefetch, pin=pin)
    return train(recipe, method, batches, resume=resume)


def printed(plan: Mapping[str, Any]) -> str:
    """A plan as JSON whose lists stand on one line each where they fit."""
    text = json.dumps(plan, indent=2)

    def on_one_line(found: re.Match[str]) -> str:
        line = "[" + re.sub(r",\n\s*", ", ", found[1].strip()) + "]"
        return line if len(line) <= 100 else found[0]

    return re.sub(r"\[\n([^\[\]{}]*?)\n\s*\]", on_one_line, text)


def _plan(recipe: Recipe, folder: Path, devices: int) -> dict[str, Any]:
    """What a dry run prints. A distillation whose teacher is not here is planned from the configs in `folder`/model."""
    rows_at_once(recipe.loop, devices)
    plan, options = recipe.resolved(), recipe.options
    distils = isinstance(options, DistilOptions)
    if not distils or (unet_folder(options.teacher) / "config.json").is_file():
        method = importlib.import_module(f"onestill.train.methods.{recipe.method}").Method(options, recipe.loop)
        plan["parameters"] = {role: sum(p.numel() for p in net.parameters()) for role, net in method.networks.items()}
    if distils:
        costs = estimate(recipe, folder / "model", devices)
        plan |= {**costs, "parameters": costs["parameters"] | plan.get("parameters", {})}
    return plan
