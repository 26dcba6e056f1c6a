"""Every figure of one contender, from its samples and the reference's.

Shapes: N prompts, F feature width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestill.evaluate.alignment import clip_scores, feature_diversity, normalise_caption, retrieval_hits, style_hits
from onestill.evaluate.colour import ColourVerdict, colour_prompts
from onestill.evaluate.protocol import Contender, Network, Pictures, Protocol
from onestill.evaluate.samples import PromptSamples, Samples
from onestill.evaluate.statistics import (
    FeatureStatistics,
    bootstrap_interval,
    density_and_coverage,
    frechet_distance,
    jackknife_error,
    kernel_distance,
    wilson_interval,
)

_BLOCKS = 10  # of the jackknife; prompt i is in block i % 10 for every contender, so that differences are paired
_NEIGHBOURS = 5  # of density and coverage


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval, where one is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Result:
    """The figures of one contender; None where the protocol leaves a test out. See docs/evaluation.md for definitions.

    Attributes:
        frechet_distance: Fréchet distance to the reference pictures, by the first network.
        frechet_replicates: the leave-one-block-out distances, block by block.
        frechet_by_network: the same distance by every network, first one included.
        kernel_distance: unbiased squared maximum mean discrepancy to the reference, likewise.
        density, coverage: fidelity and variety against the reference, k = 5.
        clip_score: 100 x mean cosine with the caption.
        retrieval: top-1 accuracy among `Protocol.retrieval_among` captions.
        style: zero-shot style accuracy over the prompts that name a style.
        diversity: mean feature distance between seeds of one prompt.
        diversity_share: that, over the mean distance between reference pictures of different prompts.
        pixel_diversity: standard deviation of a pixel over seeds, of its full range.
        colour: share of the colour test's pictures in which the named colour dominates.
        colour_verdicts: picture by picture.
        ms_per_picture: wall clock in `generate`, batches of the protocol's size; for orientation, not a benchmark.
    """

    name: str
    group: str
    num_inference_steps: int
    guidance_scale: float
    num_pictures: int
    clip_score: Figure
    retrieval: Figure
    style: Figure | None
    frechet_distance: Figure | None = None
    frechet_replicates: tuple[float, ...] = ()
    frechet_by_network: dict[str, float] = field(default_factory=dict)
    kernel_distance: float | None = None
    density: float | None = None
    coverage: float | None = None
    diversity: Figure | None = None
    diversity_share: float | None = None
    pixel_diversity: float | None = None
    colour: Figure | None = None
    colour_verdicts: tuple[ColourVerdict, ...] = ()
    ms_per_picture: float | None = None


def _blocks(features: NDArray[Any]) -> list[FeatureStatistics]:
    count = min(_BLOCKS, len(features) // 2)
    parts = [FeatureStatistics(features.shape[1]) for _ in range(count)]
    for k, statistics in enumerate(parts):
        statistics.update(features[k::count])
    return parts


def _merged(parts: Iterable[FeatureStatistics], dim: int) -> FeatureStatistics:
    whole = FeatureStatistics(dim)
    for part in parts:
        whole.merge(part)
    return whole


class Measure:
    """The figures of any samples against one reference."""

    def __init__(
        self, protocol: Protocol, networks: list[Network], texts: NDArray[Any], reference: PromptSamples
    ) -> None:
        self.protocol, self.networks, self.texts, self.reference = protocol, networks, texts, reference
        self.network = networks[0]
        self.among = min(protocol.retrieval_among, len({normalise_caption(p) for p in protocol.prompts}))
        self.statistics = {name: self._whole(features) for name, features in reference.features.items()}
        names = protocol.style_names or tuple(sorted({style for style in protocol.styles if style}))
        self.asked = [(i, names.index(style)) for i, style in enumerate(protocol.styles) if style in names]
        self.styles = np.asarray(self.network.texts(names), np.float32) if len(names) > 1 and self.asked else None
        self.spacing = self._spacing(reference.features[self.network.name])

    @staticmethod
    def _whole(features: NDArray[Any]) -> FeatureStatistics:
        return _merged(_blocks(features), features.shape[1])

    @staticmethod
    def _spacing(features: NDArray[Any]) -> float:
        """Mean distance between pictures of different prompts, over at most 1023 of them, evenly spaced."""
        some = np.asarray(features[:: max(1, len(features) // 512)], np.float64)
        squares = ((some**2).sum(1)[:, None] + (some**2).sum(1)[None] - 2 * some @ some.T).clip(0)
        return float(np.sqrt(squares)[np.triu_indices(len(some), 1)].mean())

    def distance_of(self, batches: Iterable[Pictures]) -> float:
        """Fréchet distance of other pictures to the reference, by the first network."""
        statistics = FeatureStatistics(self.statistics[self.network.name].dim)
        for pictures in batches:
            statistics.update(self.network.features(pictures))
        return frechet_distance(statistics, self.statistics[self.network.name])

    def _frechet(self, features: NDArray[Any]) -> tuple[Figure, tuple[float, ...]]:
        parts = _blocks(features)
        real = self.statistics[self.network.name]
        value = frechet_distance(_merged(parts, real.dim), real)
        if len(parts) < 2:
            return Figure(value), ()
        without = (_merged([*parts[:k], *parts[k + 1 :]], real.dim) for k in range(len(parts)))
        replicates = tuple(frechet_distance(statistics, real) for statistics in without)
        half = 1.96 * jackknife_error(replicates)
        return Figure(value, max(0.0, value - half), value + half), replicates

    def _alignment(self, features: NDArray[Any]) -> tuple[Figure, Figure, Figure | None]:
        embeddings = self.network.embed(features)
        scores = clip_scores(embeddings, self.texts)
        hits = retrieval_hits(embeddings, self.texts, self.protocol.prompts, among=self.among)
        style = None
        if self.styles is not None:
            rows, asked = [i for i, _ in self.asked], [k for _, k in self.asked]
            style = _share(style_hits(embeddings[rows], self.styles, asked))
        return Figure(float(scores.mean()), *bootstrap_interval(scores)), _share(hits), style

    def real(self) -> Result:
        """The figures of the reference itself; its distances to itself are left out."""
        clip_score, retrieval, style = self._alignment(self.reference.features[self.network.name])
        return Result(
            name="real pictures",
            group="real",
            num_inference_steps=0,
            guidance_scale=1.0,
            num_pictures=len(self.protocol.prompts),
            clip_score=clip_score,
            retrieval=retrieval,
            style=style,
        )

    def result(self, contender: Contender, samples: Samples) -> Result:
        """All figures of one contender."""
        name = self.network.name
        features, real = samples.features[name], self.reference.features[name]
        distance, replicates = self._frechet(features)
        clip_score, retrieval, style = self._alignment(features)
        enough = len(real) > _NEIGHBOURS
        density, coverage = density_and_coverage(real, features, _NEIGHBOURS) if enough else (None, None)
        diversity = feature_diversity(samples.diversity_features) if len(samples.diversity_features) else None
        verdicts = self._verdicts(samples)
        hits = sum(verdict.hit for verdict in verdicts)
        return Result(
            name=contender.name,
            group=contender.group,
            num_inference_steps=contender.num_inference_steps,
            guidance_scale=contender.guidance_scale,
            num_pictures=len(features),
            frechet_distance=distance,
            frechet_replicates=replicates,
            frechet_by_network={
                key: frechet_distance(self._whole(value), self.statistics[key])
                for key, value in samples.features.items()
            },
            kernel_distance=kernel_distance(features, real),
            density=density,
            coverage=coverage,
            clip_score=clip_score,
            retrieval=retrieval,
            style=style,
            diversity=None if diversity is None else Figure(float(diversity.mean()), *bootstrap_interval(diversity)),
            diversity_share=None if diversity is None else float(diversity.mean()) / max(self.spacing, 1e-12),
            pixel_diversity=float(samples.pixel_diversity.mean()) if len(samples.pixel_diversity) else None,
            colour=Figure(hits / len(verdicts), *wilson_interval(hits, len(verdicts))) if verdicts else None,
            colour_verdicts=verdicts,
            ms_per_picture=1000 * samples.seconds / len(features),
        )

    def _verdicts(self, samples: Samples) -> tuple[ColourVerdict, ...]:
        pairs = colour_prompts(self.protocol.colour_test) if self.protocol.colour_test else []
        rows = [(prompt, seed, colour) for prompt, colour in pairs for seed in self.protocol.colour_seeds]
        return tuple(
            ColourVerdict(prompt, seed, asked, seen or None)
            for (prompt, seed, asked), seen in zip(rows, samples.colours_seen, strict=True)
        )


def _share(hits: NDArray[Any]) -> Figure:
    return Figure(float(hits.mean()), *wilson_interval(float(hits.sum()), len(hits)))
