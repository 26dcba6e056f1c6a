"""Two servers, one PostgreSQL: what `docs/serve.md` says of running several."""

from __future__ import annotations

import http.client
import signal
import threading
import urllib.error
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.serve.server import Process, running
from onestill.serve.access.ledger import Ledger
from tests.serve.postgres import postgres

pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")
LIMIT = 60


@pytest.mark.slow
def test_two_replicas_share_keys_and_counts_and_one_may_die(tiny_folder: Path) -> None:
    with postgres() as url:
        ledger = Ledger(url)
        key_id, key = ledger.add_key("load", LIMIT)
        headers = {"authorization": f"Bearer {key}"}
        options = ["--model", str(tiny_folder), "--threads", "1", "--database", url]
        with running(options) as first, running(options) as second:
            statuses: Counter[int] = Counter()
            lock = threading.Lock()

            def draw(replicas: tuple[Process, Process]) -> None:
                """As behind a proxy: what one replica did not answer goes to the other."""
                for _ in range(20):
                    for replica in replicas:
                        try:
                            replica.draw(headers, seed=1)
                            status = 200
                        except urllib.error.HTTPError as error:
                            status = error.code
                        except (OSError, http.client.HTTPException):  # before the answer, or in the middle of it
                            continue
                        break
                    else:
                        status = 0
                    with lock:
                        statuses[status] += 1

            pairs = [(first, second), (second, first)] * 2
            threads = [threading.Thread(target=draw, args=(pair,)) for pair in pairs]
            for thread in threads:
                thread.start()
            first.stop(signal.SIGKILL)
            for thread in threads:
                thread.join(120)
            counted = {row["id"]: row for row in ledger.list_keys()}[key_id]["today"]
            # Every request was answered, by one or the other; a kill may have counted the few that were under way.
            assert set(statuses) == {200, 429}
            assert sum(statuses.values()) == 80
            assert statuses[200] <= counted == LIMIT
            assert counted - statuses[200] <= len(threads)
            assert ledger.revoke_key(key_id)
        ledger.close()
