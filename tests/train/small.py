"""The smallest real training: an autoencoder of a few hundred weights on noise. Run as a script, it can be killed.

python -m tests.train.small OUT ITERATIONS
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from onestill.data import ShardWriter
from onestill.train.loop import train
from onestill.train.methods.autoencoder import Method
from onestill.train.recipe import Recipe, parse_recipe
from onestill.train.state import TrainState

RECIPE = """
name = "tiny"
method = "autoencoder"
out = "run"

[data]
shards = ["shards"]

[autoencoder]
latent_channels = 4
encoder_width = 8
decoder_width = 8
encoder_blocks = [0, 1]
decoder_blocks = [1, 0]
discriminator_width = 8
"""
"""The same as a recipe's file, without its `[loop]`: it trains on what `write_noise_shards` writes into `shards`."""


class NoiseBatches:
    """Batch i is made from seed i alone, and has NaN in it if `spoiled` names it."""

    def __init__(self, spoiled: Callable[[int], bool] = lambda i: False, before: Callable[[int], Any] = id) -> None:
        self.position, self._spoiled, self._before = 0, spoiled, before

    def next(self) -> dict[str, Any]:
        self._before(self.position)
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(self.position)) * 2 - 1
        if self._spoiled(self.position):
            images[0] = float("nan")
        self.position += 1
        return {"images": images, "captions": ["noise", "noise"]}

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def small_recipe(out: Path, iterations: int, **loop: Any) -> Recipe:
    often = {"log_every": 1, "sheet_every": 1000, "checkpoint_every": 2, "warmup": 3}
    options = {"latent_channels": 2, "encoder_width": 4, "decoder_width": 4, "discriminator_width": 4}
    options |= {"encoder_blocks": [0, 1], "decoder_blocks": [1, 0]}
    options |= {"adversarial": 0.1, "adversarial_from": 2, "adversarial_warmup": 1}
    return parse_recipe(
        {
            "name": "small",
            "method": "autoencoder",
            "out": str(out),
            "loop": {"iterations": iterations, "batch_size": 2, **often, **loop},
            "autoencoder": options,
        }
    )


def small_train(
    out: Path, iterations: int, batches: NoiseBatches | None = None, *, resume: bool = False, **loop: Any
) -> TrainState:
    recipe = small_recipe(out, iterations, **loop)
    return train(recipe, Method(recipe.options, recipe.loop), batches or NoiseBatches(), resume=resume)


def rows(out: Path) -> list[dict[str, Any]]:
    """The run's metrics without what a clock says."""
    made = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "data_wait")} for row in made]


def write_noise_shards(folder: Path, count: int = 6) -> None:
    """Shards of `count` pictures of noise, 32 px a side, with the caption "noise"."""
    draw = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            writer.write(f"noise-{i}", file.getvalue(), "noise", {}, suffix="png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    small_train(Path(sys.argv[1]), int(sys.argv[2]))
