"""Two replicas under Ray Serve, one of which is killed. Takes a minute or two; skips without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serve.replicas import measured

pytest.importorskip("ray.serve", reason="the extra [ray] is not installed")


@pytest.mark.slow
def test_a_replica_is_killed_and_no_request_is_lost(tiny_folder: Path) -> None:
    report = measured("ray", ["--model", str(tiny_folder), "--threads", "1"], typists=3, clients=3, seconds=15)
    assert all(report["asked"].values()), report
    assert report["api_statuses"]["200"] > 8
    assert report["answers"]["image"] > 8
