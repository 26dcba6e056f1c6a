from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

from onestill.serve.metrics import Metrics
from tests.serve.client import Served, answer_on

DOCS = Path(__file__).parents[2] / "docs" / "serve.md"


def test_numbers_are_whole() -> None:
    """Counts beyond a million, bytes and times lose no digit."""
    metrics = Metrics()
    metrics.count("onestill_pictures_total", 12_345_678, route="images")
    for _ in range(3):
        metrics.observe("onestill_loop_lag_seconds", 0.1)
    text = metrics.render({"onestill_resident_bytes": ("Bytes.", 4_567_891_234.0)}, Counter(drawn=1_234_567))
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['onestill_pictures_total{route="images"}'] == "12345678"
    assert lines['onestill_scheduler_total{event="drawn"}'] == "1234567"
    assert lines["onestill_resident_bytes"] == "4567891234"
    assert lines["onestill_loop_lag_seconds_count"] == lines['onestill_loop_lag_seconds_bucket{le="+Inf"}'] == "3"
    assert float(lines["onestill_loop_lag_seconds_sum"]) == 0.1 + 0.1 + 0.1
    assert float(lines["onestill_start_time_seconds"]) == metrics._started


def test_every_number_of_the_documentation_exists(served: Served) -> None:
    assert served.draw().status == 200
    with served.live() as live:
        live.send('{"id": 1, "prompt": "a"}')
        answer_on(live)
        deadline = time.monotonic() + 60
        # The event loop looks at its own lag now and then; what was never measured is not shown.
        while "onestill_loop_lag_seconds" not in (text := served.ask("GET", "/metrics").body.decode()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    documented = set(re.findall(r"^\| `(onestill_\w+)", DOCS.read_text(encoding="utf-8"), re.M))
    assert documented == set(re.findall(r"^# TYPE (\S+) ", text, re.M))
