"""What every contender of an evaluation is given alike, and what a contender and a feature network are.

Shapes: B batch, F feature width, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestill.errors import DataError
from onestill.evaluate.colour import ColourTest, colour_prompts

Pictures = NDArray[np.uint8]
"""uint8 [B, H, W, 3], RGB."""
Generate = Callable[[Sequence[str], Sequence[int]], Pictures]
"""(prompts, seeds), B of each -> pictures. One seed names one picture, whatever else is in the batch."""


@dataclass(frozen=True)
class Network:
    """An image-text network as plain callables of arrays.

    Attributes:
        name: how reports call it.
        features: pictures -> [B, F] float; what the Fréchet distance, coverage and diversity are measured in.
        texts: captions -> [B, D] float.
        project: features [B, F] -> image embeddings [B, D] beside the captions'; None: the features are that already.
        fingerprint: names its weights, so that saved features are not mixed up.
    """

    name: str
    features: Callable[[Pictures], NDArray[Any]]
    texts: Callable[[Sequence[str]], NDArray[Any]]
    project: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    fingerprint: str = ""

    def embed(self, features: NDArray[Any]) -> NDArray[Any]:
        """Image embeddings [B, D] of features [B, F]."""
        return features if self.project is None else self.project(features)


@dataclass(frozen=True)
class Contender:
    """One way to make pictures from prompts.

    Attributes:
        name: unique in an evaluation, e.g. "teacher, 50 steps".
        generate: see `Generate`.
        num_inference_steps: network calls a picture (twice that with guidance).
        guidance_scale: 1 means none.
        group: contenders of one group are joined by a line in charts, e.g. "teacher".
        settings: whatever else decides the pictures (model hash, engine, dtype, sampler); JSON-able.
    """

    name: str
    generate: Generate
    num_inference_steps: int
    guidance_scale: float = 1.0
    group: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """The prompts, seeds and sets of an evaluation: the same for every contender.

    Attributes:
        prompts: N captions.
        seeds: N seeds, one a prompt.
        styles: N style phrases that the captions ask for, None where a caption names none; or empty.
        style_names: the styles to choose among for the zero-shot style accuracy; default: those of `styles`.
        sheets: name -> indices into `prompts` whose pictures are kept to be shown.
        num_worst: how many pictures with the lowest CLIP score are kept to be shown as failures.
        retrieval_among: captions to choose among.
        num_diversity_prompts: prompts, evenly spaced in `prompts`, that are drawn with every diversity seed.
        diversity_seeds: two seeds or more.
        colour_test: None leaves the test out.
        colour_seeds: each colour prompt is drawn with each.
        batch_size: pictures a call.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    styles: tuple[str | None, ...] = ()
    style_names: tuple[str, ...] = ()
    sheets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    num_worst: int = 12
    retrieval_among: int = 100
    num_diversity_prompts: int = 50
    diversity_seeds: tuple[int, ...] = (101, 102, 103, 104)
    colour_test: ColourTest | None = field(default_factory=ColourTest)
    colour_seeds: tuple[int, ...] = (0, 1, 2, 3)
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse what no contender could be measured on.

        Raises:
            DataError: lists of different lengths, too few prompts, or an index that no prompt has.
        """
        if len(self.prompts) != len(self.seeds) or len(self.prompts) < 2:
            raise DataError(
                f"an evaluation needs two prompts or more and one seed for each, got {len(self.prompts)} prompts "
                f"and {len(self.seeds)} seeds"
            )
        if self.styles and len(self.styles) != len(self.prompts):
            raise DataError(f"got {len(self.styles)} styles for {len(self.prompts)} prompts; give one a prompt or none")
        if self.num_diversity_prompts and len(self.diversity_seeds) < 2:
            raise DataError("diversity needs two seeds or more; add seeds, or set num_diversity_prompts to 0")
        if outside := [i for indices in self.sheets.values() for i in indices if not 0 <= i < len(self.prompts)]:
            raise DataError(f"a sheet names prompt {outside[0]}, and there are {len(self.prompts)}")

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of all pictures that some sheet shows, ascending."""
        return tuple(sorted({index for indices in self.sheets.values() for index in indices}))

    @property
    def diversity_indices(self) -> tuple[int, ...]:
        """Indices of the prompts that are drawn with every diversity seed."""
        count = min(self.num_diversity_prompts, len(self.prompts))
        return tuple(int(i) for i in np.linspace(0, len(self.prompts) - 1, count).round())

    @property
    def num_pictures(self) -> int:
        """How many pictures a contender draws: the prompts', and those of diversity and colours."""
        diversity = len(self.diversity_indices) * len(self.diversity_seeds)
        test = self.colour_test
        return len(self.prompts) + diversity + (len(colour_prompts(test)) * len(self.colour_seeds) if test else 0)

    def fingerprint(self, contender: Contender, networks: Sequence[Network]) -> str:
        """sha256 of everything that decides what a contender's saved features are."""
        test = self.colour_test
        content = {
            "contender": [contender.name, contender.num_inference_steps, contender.guidance_scale],
            "settings": dict(contender.settings),
            "prompts": self.prompts,
            "seeds": self.seeds,
            "kept": self.kept,
            "num_worst": self.num_worst,
            "diversity": [self.diversity_indices, self.diversity_seeds],
            "colours": None if test is None else [test.colours, test.shapes, test.template, self.colour_seeds],
            "networks": [[network.name, network.fingerprint] for network in networks],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
