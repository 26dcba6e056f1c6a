"""One protocol, many contenders: draw, measure, compare.

Shapes: N prompts, F feature width, D embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from onestill.errors import DataError
from onestill.evaluate.measure import Figure, Measure, Result
from onestill.evaluate.protocol import Contender, Network, Pictures, Protocol
from onestill.evaluate.samples import PromptSamples, Samples, draw_samples, load_samples, observe, save_samples, slug
from onestill.evaluate.statistics import jackknife_error

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report shows.

    Attributes:
        protocol: the prompts, seeds and sets.
        network: name of the first feature network; all figures but `frechet_by_network` are by it.
        real: the figures of the reference pictures themselves, as if a contender had drawn them (no distances).
        results: one a contender, in the order given.
        drawn: their samples, in the same order.
        reference: the reference's samples.
        floor: distance between the reference and other real pictures, as many, or None.
        retrieval_among: the number really used.
    """

    protocol: Protocol
    network: str
    real: Result
    results: tuple[Result, ...]
    drawn: tuple[Samples, ...]
    reference: PromptSamples
    floor: float | None
    retrieval_among: int

    def result(self, name: str) -> Result:
        """The result of the contender called `name`."""
        for result in self.results:
            if result.name == name:
                return result
        raise DataError(f"no contender is called '{name}': there are {', '.join(r.name for r in self.results)}")

    def pictures(self, name: str) -> Samples:
        """The samples of the contender called `name`."""
        return self.drawn[self.results.index(self.result(name))]


def evaluate(
    contenders: Sequence[Contender],
    protocol: Protocol,
    reference: Iterable[Pictures],
    networks: Sequence[Network],
    folder: Path | str,
    *,
    floor: Iterable[Pictures] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Draw and measure every contender on the same prompts, seeds and sets.

    Each contender's samples are saved as soon as they are drawn. Running again with the same arguments reads
    them, so that a killed evaluation loses the contender it was in and no other.

    Args:
        contenders: names must differ by more than punctuation.
        protocol: the same for all.
        reference: batches of the real pictures of `protocol.prompts`, in that order.
        networks: the first one decides the figures; the others only add their Fréchet distance. The first should
            have had no part in training any contender.
        folder: where samples are saved.
        floor: batches of other real pictures, as many as there are prompts: their distance to the reference is what a
            perfect contender would score.
        progress: called with (contender, pictures done, pictures in all).

    Raises:
        DataError: pictures of a wrong shape or number, or contenders that share a name.
    """
    if not networks:
        raise DataError("an evaluation needs a feature network; give one")
    (slugged, count), *_ = Counter(slug(contender.name) for contender in contenders).most_common(1) or [("", 0)]
    if count > 1:
        alike = " and ".join(f"'{one.name}'" for one in contenders if slug(one.name) == slugged)
        raise DataError(f"contenders need names that differ by more than punctuation, unlike {alike}; give each once")
    nets = list(networks)
    texts = np.asarray(nets[0].texts(protocol.prompts), np.float32)
    real = observe(reference, protocol, nets, texts, "the reference")
    measure = Measure(protocol, nets, texts, real)
    results, drawn = [], []
    for contender in contenders:
        fingerprint = protocol.fingerprint(contender, nets)
        samples = load_samples(Path(folder), contender.name, fingerprint)
        if samples is None:
            report = None if progress is None else partial(progress, contender.name)
            samples = draw_samples(contender, protocol, nets, texts, report)
            save_samples(samples, Path(folder), contender.name, fingerprint)
        results.append(measure.result(contender, samples))
        drawn.append(samples)
    other = None if floor is None else measure.distance_of(floor)
    return Evaluation(protocol, nets[0].name, measure.real(), tuple(results), tuple(drawn), real, other, measure.among)


def frechet_ratio(first: Result, second: Result) -> Figure:
    """First's Fréchet distance over second's, with a 95 % interval by the paired jackknife over prompts."""
    if first.frechet_distance is None or second.frechet_distance is None:
        raise DataError("a ratio needs two contenders that were measured against a reference")
    ratio = first.frechet_distance.value / second.frechet_distance.value
    replicates = [a / b for a, b in zip(first.frechet_replicates, second.frechet_replicates, strict=True)]
    half = 1.96 * jackknife_error(replicates)
    return Figure(ratio, ratio - half, ratio + half)
