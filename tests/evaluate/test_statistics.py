from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onestill.errors import DataError
from onestill.evaluate.statistics import (
    FeatureStatistics,
    bootstrap_interval,
    density_and_coverage,
    frechet_distance,
    jackknife_error,
    kernel_distance,
    wilson_interval,
)


def of(features: np.ndarray) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    """Statistics with exactly this mean and covariance."""
    statistics = FeatureStatistics(len(mean))
    statistics.count, statistics.mean, statistics.scatter = 2, np.asarray(mean, float), np.asarray(covariance, float)
    return statistics


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [7, 0, 50, 43]])
def test_streaming_in_any_batches_is_the_plain_mean_and_covariance(sizes: list[int]) -> None:
    # A mean of 1000 beside a spread of 1 costs the naive formula half its digits in float32.
    features = np.random.default_rng(0).normal(1000, 1, (100, 5))
    statistics = FeatureStatistics(5)
    for part in np.split(features, np.cumsum(sizes)[:-1]):
        statistics.update(part)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.T), rtol=0, atol=1e-10)


def test_merging_is_seeing_everything() -> None:
    features = np.random.default_rng(1).normal(size=(60, 4)) + np.arange(60)[:, None]
    whole = FeatureStatistics(4)
    for part in (features[:13], features[13:14], features[14:]):
        whole.merge(of(part))
    whole.merge(FeatureStatistics(4))
    np.testing.assert_allclose(whole.covariance, of(features).covariance, rtol=1e-12)
    np.testing.assert_allclose(whole.mean, features.mean(0), rtol=1e-14)


def test_saving_keeps_every_bit(tmp_path: Path) -> None:
    statistics = of(np.random.default_rng(2).normal(size=(20, 3)))
    statistics.save(tmp_path / "s.safetensors")
    again = FeatureStatistics.load(tmp_path / "s.safetensors")
    assert again.count == 20
    assert (again.mean == statistics.mean).all()
    assert (again.scatter == statistics.scatter).all()
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"\x08\x00\x00")
    with pytest.raises(DataError, match="measure again"):
        FeatureStatistics.load(path)
    with pytest.raises(DataError, match="measure again"):
        FeatureStatistics.load(tmp_path / "none")


def test_wrong_features_are_refused() -> None:
    statistics = FeatureStatistics(3)
    with pytest.raises(DataError, match=r"\[B, 3\]"):
        statistics.update(np.zeros((2, 4)))
    with pytest.raises(DataError, match="not finite"):
        statistics.update([[0.0, np.nan, 0.0]])
    with pytest.raises(DataError, match="at least 2"):
        _ = statistics.covariance
    with pytest.raises(DataError, match="width 4"):
        statistics.merge(FeatureStatistics(4))


def test_frechet_distance_of_known_gaussians() -> None:
    # Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2.
    first = gaussian(np.array([0.0, 0.0, 1.0]), np.diag([1.0, 4.0, 9.0]))
    second = gaussian(np.array([3.0, 4.0, 1.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(first, second) == pytest.approx(25 + 1 + 0 + 4, rel=1e-12)
    assert frechet_distance(second, first) == pytest.approx(30, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_does_not_change_under_rotation() -> None:
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    first = gaussian(np.zeros(3), rotation @ np.diag([1.0, 4.0, 9.0]) @ rotation.T)
    second = gaussian(rotation @ np.array([3.0, 4.0, 0.0]), rotation @ np.diag([4.0, 4.0, 1.0]) @ rotation.T)
    assert frechet_distance(first, second) == pytest.approx(30, rel=1e-10)


@pytest.mark.parametrize("count", [200, 8])
def test_frechet_distance_is_the_textbook_formula(count: int) -> None:
    # With 8 vectors of width 16 both covariances are singular.
    rng = np.random.default_rng(4)
    first, second = (of(rng.normal(size=(count, 16)) @ rng.normal(size=(16, 16)) + rng.normal(size=16)) for _ in "12")
    # The slow twin takes the trace of the root of C1 C2 itself, which is not symmetric, by its complex eigenvalues.
    root = np.sqrt(np.linalg.eigvals(first.covariance @ second.covariance).astype(complex)).sum().real
    delta = first.mean - second.mean
    expected = delta @ delta + np.trace(first.covariance + second.covariance) - 2 * root
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_is_its_double_sum() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(6, 4)), rng.normal(0.5, 1, size=(5, 4))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    within_x = np.mean([k(x[i], x[j]) for i in range(6) for j in range(6) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-10)


def test_kernel_distance_of_one_source_is_zero_on_average() -> None:
    rng = np.random.default_rng(6)
    values = [kernel_distance(rng.normal(size=(40, 8)), rng.normal(size=(30, 8))) for _ in range(100)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 10
    assert kernel_distance(rng.normal(size=(40, 8)), rng.normal(2, 1, size=(40, 8))) > 1


def test_density_and_coverage_tell_what_is_missing() -> None:
    rng = np.random.default_rng(7)
    real = np.concatenate([rng.normal(0, 1, (100, 2)), rng.normal(50, 1, (100, 2))])
    same = np.concatenate([rng.normal(0, 1, (100, 2)), rng.normal(50, 1, (100, 2))])
    one_mode = rng.normal(0, 1, (200, 2))
    far = rng.normal(1000, 1, (200, 2))
    density, coverage = density_and_coverage(real, same)
    assert density == pytest.approx(1, abs=0.15)
    assert coverage > 0.9
    assert density_and_coverage(real, one_mode)[1] == pytest.approx(0.5, abs=0.03)
    assert density_and_coverage(real, far) == (0, 0)
    with pytest.raises(DataError, match="more than 5"):
        density_and_coverage(real[:5], same)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    sample = np.random.default_rng(8).normal(size=50)
    replicates = [np.delete(sample, i).mean() for i in range(50)]
    assert jackknife_error(replicates) == pytest.approx(sample.std(ddof=1) / 50**0.5, rel=1e-10)


def test_intervals_are_repeatable_and_cover() -> None:
    sample = np.random.default_rng(9).normal(3, 1, 400)
    low, high = bootstrap_interval(sample)
    assert (low, high) == bootstrap_interval(sample)
    assert (high - low) / 2 == pytest.approx(1.96 * sample.std() / 20, rel=0.15)
    assert low < sample.mean() < high
    assert wilson_interval(0, 100) == (0.0, pytest.approx(0.037, abs=0.001))
    assert wilson_interval(100, 100) == (pytest.approx(0.963, abs=0.001), 1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)
