"""Small drawings with known colours for the tests of this folder, and a feature network that sees colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from onestill.evaluate import Network
from onestill.evaluate.colour import PALETTE

NAMES = ("red", "green", "blue", "yellow", "purple", "orange", "teal", "brown")
KINDS = ("heart", "star", "circle", "square", "triangle")


def shape(
    colour: str | tuple[int, int, int],
    kind: str = "circle",
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    size: int = 32,
    at: tuple[float, float] = (0.5, 0.5),
    radius: float = 0.3,
    outline: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """uint8 [size, size, 3]."""
    fill = PALETTE[colour] if isinstance(colour, str) else colour
    image = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(image)
    (x, y), r = (at[0] * size, at[1] * size), radius * size
    if kind == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill, outline=outline, width=2)
    elif kind == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill, outline=outline)
    else:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=outline, width=2)
    return np.asarray(image)


class Painter:
    """A contender that paints the colour and shape its prompt names, somewhere that the seed says."""

    def __init__(self, mistakes: float = 0.0, spread: float = 0.15) -> None:
        self.mistakes, self.spread = mistakes, spread
        self.calls = 0

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        self.calls += 1
        return np.stack([self._one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])

    def _one(self, prompt: str, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        named = next((name for name in NAMES if name in prompt), "black")
        colour = NAMES[rng.integers(len(NAMES))] if rng.random() < self.mistakes else named
        kind = next((kind for kind in KINDS if kind in prompt), "circle")
        return shape(colour, kind, at=tuple(0.5 + self.spread * rng.uniform(-1, 1, 2)), radius=rng.uniform(0.2, 0.35))


def colour_network(name: str = "colours") -> Network:
    """Features: the mean colour of the four quarters; embeddings: the mean foreground colour in both spaces."""

    def features(pictures: np.ndarray) -> np.ndarray:
        b, h, w, _ = pictures.shape
        quarters = pictures.reshape(b, 2, h // 2, 2, w // 2, 3).mean((2, 4)).reshape(b, 12)
        return (quarters / 255).astype(np.float32)

    def project(values: np.ndarray) -> np.ndarray:
        return 1 - values.reshape(-1, 4, 3).mean(1)

    def texts(prompts: Sequence[str]) -> np.ndarray:
        named = [next((name for name in NAMES if name in prompt), "white") for prompt in prompts]
        return 1 - np.array([PALETTE[name] for name in named], np.float32) / 255

    return Network(name, features, texts, project, fingerprint=name)
