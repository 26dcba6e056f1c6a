"""Tiny ADD on fixed latents, alone or as one of several processes, which a test starts.

python -m tests.train.worlds PARTS OUT KIND...      KIND: ddp, fsdp
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onestill.train.loop import train
from onestill.train.methods.add import Method
from onestill.train.recipe import Recipe, parse_recipe
from onestill.train.runtime import parallel
from onestill.train.state import TrainState
from tests.train.parts import add_recipe, latents_batch

BATCH, ITERATIONS = 8, 3
CAPTIONS = ["a", "b", "b", "c", "a", "d", "d", "a"]  # of which three are those of the sample before, in both halves


class PartBatches:
    """Batch i is made from seed i alone; each process holds every n-th of its rows."""

    def __init__(self, part: tuple[int, int]) -> None:
        self.position, self.part = 0, part

    def next(self) -> dict[str, Any]:
        self.position += 1
        first, step = self.part
        batch = latents_batch(BATCH, seed=self.position) | {"captions": CAPTIONS}
        return {key: value[first::step] for key, value in batch.items()}

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def world_recipe(parts: Path, out: Path, **loop: Any) -> Recipe:
    often = {"log_every": 1, "sheet_every": 99, "checkpoint_every": 1, "keep_checkpoints": 9, "warmup": 0}
    # Adam makes much of a gradient that is nearly zero, and of how it was summed: this seed has none such.
    often |= {"iterations": ITERATIONS, "batch_size": BATCH, "seed": 2}
    options = add_recipe(
        parts,
        features__network="both",
        distillation__teacher_guidance=2.0,
        lr=1e-3,
        heads__lr=1e-3,
        adversarial__misaligned=1.0,
    ).options
    table = {"name": "world", "method": "add", "out": str(out), "loop": {**often, **loop}}
    return parse_recipe({**table, "add": dataclasses.asdict(options)})


def world_train(parts: Path, out: Path, *, resume: bool = False, **loop: Any) -> TrainState:
    recipe = world_recipe(parts, out, **loop)
    parallel.start("cpu")
    batches = PartBatches((parallel.rank(), parallel.world()))
    return train(recipe, Method(recipe.options, recipe.loop), batches, resume=resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[3:]:
        world_train(Path(sys.argv[1]), Path(sys.argv[2]) / kind, parallel=kind)
