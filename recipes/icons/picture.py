"""The README's picture: what the model draws in one step for a fixed list of prompts, picture i with seed i.

python -m recipes.icons.picture --out docs/assets/readme.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

import onestill
from onestill.pipeline.sheet import sheet

PROMPTS = (
    "a red apple, fluent 3d emoji", "a yellow circle", "a green square", "a red heart",
    "a blue star", "a purple triangle", "a grinning face, noto emoji", "a green leaf, fluent flat emoji",
    "a cat face, noto emoji", "a yellow bell on a blue background", "an orange, fluent 3d emoji",
    "a black solid icon of a house",
    "a tree, noto emoji", "a cookie, twemoji", "a full moon, fluent gradient emoji", "a blue umbrella, twemoji",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--out", required=True)
    options = parser.parse_args(arguments)
    pipeline = onestill.load(options.model)
    images = pipeline(list(PROMPTS), seed=0, num_inference_steps=options.steps).images
    page = sheet([np.asarray(image) for image in images], list(PROMPTS))
    page.quantize(256).save(options.out, optimize=True)  # a third of the bytes, for a file that git keeps for ever


if __name__ == "__main__":
    main()
