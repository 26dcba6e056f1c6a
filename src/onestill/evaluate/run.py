"""One protocol, many contenders: draw, measure, compare.

Shapes: N prompts, F feature width, D embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onestill.errors import DataError
from onestill.evaluate.drawn import Drawn, draw, load_drawn, observe, save_drawn, slug
from onestill.evaluate.measure import Figure, Measure, Result
from onestill.evaluate.protocol import Contender, Network, Pictures, Protocol
from onestill.evaluate.statistics import jackknife_error

__all__ = ["Evaluation", "evaluate", "fid_ratio"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Everything that a report shows.

    Attributes:
        protocol: the prompts, seeds and sets.
        network: name of the first feature network; all figures but `fid_by_network` are by it.
        real: the figures of the reference pictures themselves, as if a contender had drawn them (no distances).
        results: one a contender, in the order given.
        drawn: their pictures, in the same order.
        reference: the reference's pictures.
        floor: distance between the reference and other real pictures, as many, or None.
        retrieval_among: the number really used.
    """

    protocol: Protocol
    network: str
    real: Result
    results: tuple[Result, ...]
    drawn: tuple[Drawn, ...]
    reference: Drawn
    floor: float | None
    retrieval_among: int

    def result(self, name: str) -> Result:
        """The result of the contender called `name`."""
        for result in self.results:
            if result.name == name:
                return result
        raise DataError(f"no contender is called '{name}': there are {', '.join(r.name for r in self.results)}")

    def pictures(self, name: str) -> Drawn:
        """The pictures of the contender called `name`."""
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

    Each contender's material is saved as soon as it is drawn; running again with the same arguments reads it, so that a
    killed evaluation loses the contender it was in and no other.

    Args:
        contenders: names must differ by more than punctuation.
        protocol: the same for all.
        reference: batches of the real pictures of `protocol.prompts`, in that order.
        networks: the first one decides the figures; the others only add their Fréchet distance. The first should
            have had no part in training any contender.
        folder: where material is kept.
        floor: batches of other real pictures, as many as there are prompts: their distance to the reference is what a
            perfect contender would score.
        progress: told (contender, pictures done, pictures in all).

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
    real_drawn = _observed(reference, protocol, nets, texts, "the reference")
    measure = Measure(protocol, nets, texts, real_drawn)
    results, drawn = [], []
    for contender in contenders:
        fingerprint = protocol.fingerprint(contender, nets)
        material = load_drawn(Path(folder), contender.name, fingerprint)
        if material is None:
            told = _told(progress, contender.name)
            material = draw(contender, protocol, nets, texts, told)
            save_drawn(material, Path(folder), contender.name, fingerprint)
        results.append(measure.result(contender, material))
        drawn.append(material)
    other = None if floor is None else measure.distance_of(floor)
    return Evaluation(
        protocol, nets[0].name, measure.real(), tuple(results), tuple(drawn), real_drawn, other, measure.among
    )


def fid_ratio(first: Result, second: Result) -> Figure:
    """First's Fréchet distance over second's, with a 95 % interval by the paired jackknife over prompts."""
    if first.fid is None or second.fid is None:
        raise DataError("a ratio needs two contenders that were measured against a reference")
    ratio = first.fid.value / second.fid.value
    replicates = [a / b for a, b in zip(first.fid_replicates, second.fid_replicates, strict=True)]
    half = 1.96 * jackknife_error(replicates)
    return Figure(ratio, ratio - half, ratio + half)


def _told(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _observed(
    batches: Iterable[Pictures], protocol: Protocol, networks: list[Network], texts: NDArray[Any], who: str
) -> Drawn:
    observed = observe(batches, protocol, networks, texts, who)
    nothing = np.zeros((0, 1, 1, 3), np.uint8)
    return Drawn(
        **observed._asdict(),
        diversity_features=np.zeros((0, 2, 1), np.float32),
        diversity_pictures=nothing[None],
        pixel_diversity=np.zeros(0),
        colours_seen=(),
        colour_pictures=nothing,
        seconds=0.0,
    )
