"""Statistics of feature vectors and the distances between two sets of pictures that rest on them.

Everything is NumPy in float64 and streams: a set of any size is seen one batch at a time.

Shapes: B batch, N pictures, M references, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from onestill.checkpoint import written_whole
from onestill.errors import DataError, first_line

Float = NDArray[np.float64]


class FeatureStatistics:
    """Mean and covariance of a stream of feature vectors, float64, by Chan's pairwise update.

    Subtracting a running mean first keeps the digits that `E[x x^T] - mean mean^T` loses when the mean is large
    beside the spread.

    Example:
        >>> statistics = FeatureStatistics(2)
        >>> statistics.update([[0.0, 1.0], [2.0, 1.0]])
        >>> statistics.mean
        array([1., 1.])
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean: Float = np.zeros(dim)
        self.scatter: Float = np.zeros((dim, dim))  # sum of outer products of deviations from the mean

    @property
    def dim(self) -> int:
        """Feature width D."""
        return int(self.mean.shape[0])

    @property
    def covariance(self) -> Float:
        """Unbiased covariance [D, D]; needs two vectors or more."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 pictures, and {self.count} were given; add pictures")
        return self.scatter / (self.count - 1)

    def update(self, features: ArrayLike) -> None:
        """Add a batch of feature vectors [B, D], any float type. An empty batch changes nothing.

        Raises:
            DataError: the shape is not [B, D], or a value is not finite.
        """
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise DataError(f"features must be [B, {self.dim}], got {list(batch.shape)}; use one feature network a set")
        if not np.isfinite(batch).all():
            raise DataError("a feature is not finite; look for a broken picture or a feature network in half precision")
        if len(batch) == 0:
            return
        mean = batch.mean(axis=0)
        centred = batch - mean
        self._combine(len(batch), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add everything `other` has seen; the order of merges does not matter beyond rounding."""
        if other.dim != self.dim:
            raise DataError(f"cannot merge statistics of width {other.dim} into width {self.dim}; use one network")
        if other.count:
            self._combine(other.count, other.mean, other.scatter)

    def _combine(self, count: int, mean: Float, scatter: Float) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def save(self, path: Path | str) -> None:
        """Write to one safetensors file, atomically."""
        tensors = {"count": np.array([self.count], np.int64), "mean": self.mean, "scatter": self.scatter}
        with written_whole(Path(path)) as unfinished:
            save_file(tensors, unfinished, metadata={"format": "onestill.feature_statistics", "version": "1"})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged or something else.
        """
        try:
            tensors = load_file(path)
            statistics = cls(int(tensors["mean"].shape[0]))
            statistics.count = int(tensors["count"][0])
            statistics.mean, statistics.scatter = tensors["mean"], tensors["scatter"]
        except (OSError, SafetensorError, KeyError, IndexError) as error:
            raise DataError(
                f"{path} holds no feature statistics ({first_line(error)}); delete it and measure again"
            ) from error
        return statistics


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet distance between the Gaussians fitted to two sets of features.

    Only with the features of InceptionV3 is it what the literature calls FID.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2). The last trace is taken from the symmetric matrix
    C1^(1/2) C2 C1^(1/2), which has the same eigenvalues as C1 C2 (Heusel et al. 2017, eq. 6): two symmetric
    eigen-decompositions, no complex square root, and exact for singular covariances.

    Returns:
        A number >= 0. It falls with the number of pictures: compare only sets of one size.
    """
    delta = first.mean - second.mean
    covariance_1, covariance_2 = first.covariance, second.covariance
    values, vectors = np.linalg.eigh(covariance_1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = root @ covariance_2 @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    distance = delta @ delta + np.trace(covariance_1) + np.trace(covariance_2) - 2 * cross
    return float(max(distance, 0.0))


def kernel_distance(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Bińkowski et al. 2018), on whole sets.

    Unlike the Fréchet distance its expectation does not depend on the number of pictures, so it can be slightly
    negative for two sets from one source.

    Args:
        first: features [N, D].
        second: features [M, D].
    """
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise DataError(f"a kernel distance needs features [N>=2, D] twice, got {list(x.shape)} and {list(y.shape)}")
    width = x.shape[1]

    def within(a: Float) -> float:
        gram = (a @ a.T / width + 1) ** 3
        return float((gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1)))

    across = float(((x @ y.T / width + 1) ** 3).mean())
    return within(x) + within(y) - 2 * across


def _squared_distances(x: Float, y: Float) -> Float:
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * (x @ y.T)
    return np.asarray(np.clip(squares, 0, None), np.float64)


def density_and_coverage(reference: NDArray[Any], generated: NDArray[Any], k: int = 5) -> tuple[float, float]:
    """Density (fidelity) and coverage (variety) of a generated set (Naeem et al. 2020).

    Around each reference lies the ball that reaches its k-th nearest other reference. Density is the mean number
    of balls a generated picture falls into, over k (about 1 for the same distribution, can exceed it); coverage is
    the share of balls that hold at least one generated picture (at most 1).

    Args:
        reference: features [M, D], M > k.
        generated: features [N, D].
        k: how many neighbours wide a ball is.
    """
    real, fake = np.asarray(reference, np.float64), np.asarray(generated, np.float64)
    if len(real) <= k:
        raise DataError(f"coverage with k={k} needs more than {k} references, got {len(real)}; add references")
    among = _squared_distances(real, real)
    np.fill_diagonal(among, np.inf)
    radius = np.partition(among, k - 1, axis=1)[:, k - 1]  # [M]
    inside = _squared_distances(real, fake) < radius[:, None]  # [M, N]
    return float(inside.sum(axis=0).mean() / k), float(inside.any(axis=1).mean())


def jackknife_error(replicates: Sequence[float]) -> float:
    """Standard error of an estimate from its K leave-one-block-out replicates.

    Used for the Fréchet distance, where the bootstrap is biased: drawing with replacement repeats pictures, which
    shrinks the covariance.
    """
    if len(replicates) < 2:
        raise DataError("a jackknife needs at least 2 blocks of pictures; add pictures")
    return float(np.sqrt(np.var(replicates) * (len(replicates) - 1)))


def bootstrap_interval(
    values: ArrayLike, *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N], the same for the same `seed`."""
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or len(sample) == 0:
        raise DataError(f"an interval needs a list of at least one number, got shape {list(sample.shape)}")
    rng = np.random.default_rng(seed)
    means = np.array([sample[rng.integers(0, len(sample), len(sample))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson_interval(hits: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share `hits / total`: sensible at 0, at 1 and for few trials."""
    if total <= 0:
        return 0.0, 1.0
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))
