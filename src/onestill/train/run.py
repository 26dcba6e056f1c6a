"""Train one recipe: read it, build its method, wire its data, run the loop."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from onestill.train import parallel
from onestill.train.batches import COLLATE, Reader, SampleBatches
from onestill.train.loop import train
from onestill.train.recipe import DataOptions, read_recipe
from onestill.train.state import TrainState
from onestill.train.turns import rows_at_once


def train_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    reader: Callable[[DataOptions, tuple[int, int]], Reader],
    resume: bool = False,
    dry_run: bool = False,
    say: Callable[[str], Any] = print,
) -> TrainState | None:
    """Train what the recipe at `path` describes.

    Args:
        overrides: `KEY=VALUE` settings that replace the recipe's.
        reader: opens the part (i, n) of the data that `[data]` names, every n-th sample from i on; given by the
            caller, since training knows no file format.
        dry_run: read and check everything, build the networks, print the resolved recipe and their sizes, stop.
    """
    recipe = read_recipe(path, overrides)
    transformers.utils.logging.disable_progress_bar()  # it would tear the line that shows the training
    diffusers.utils.logging.set_verbosity_error()
    if recipe.loop.threads:
        torch.set_num_threads(recipe.loop.threads)
    parallel.start(recipe.loop.device)
    rank, world = parallel.rank(), parallel.world()
    rows = rows_at_once(recipe.loop, world) * recipe.loop.accumulate
    module = importlib.import_module(f"onestill.train.methods.{recipe.method}")
    method = module.Method(recipe.options, recipe.loop)
    if dry_run:
        sizes = {role: sum(p.numel() for p in net.parameters()) for role, net in method.networks.items()}
        say(json.dumps({**recipe.resolved(), "parameters": sizes}, indent=1))
        return None
    samples = reader(recipe.data, (rank, world))
    batches = SampleBatches(samples, COLLATE[method.batch], rows, recipe.data.prefetch)
    return train(recipe, method, batches, resume=resume)
