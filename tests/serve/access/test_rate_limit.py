from __future__ import annotations

import pytest

from onestill.serve.access import rate_limit
from onestill.serve.access.rate_limit import TokenBucket, TokenBuckets


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(rate_limit.time, "monotonic", lambda: now[0])
    return now


def test_a_bucket_allows_a_burst_and_then_its_rate(clock: list[float]) -> None:
    bucket = TokenBucket(2.0, 3.0)
    assert [bucket.take() for _ in range(4)] == [True] * 3 + [False]
    clock[0] += 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
    clock[0] += 100
    assert [bucket.take() for _ in range(4)] == [True] * 3 + [False]


def test_names_are_limited_apart_and_full_buckets_forgotten(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_limit, "MOST_NAMES", 2)
    buckets = TokenBuckets(1.0, 1.0)
    assert [buckets.take(name) for name in "aab"] == [True, False, True]
    assert not buckets.take("c")  # two names are in use
    clock[0] += 1
    assert buckets.take("c")
