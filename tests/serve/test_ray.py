"""Two replicas under Ray Serve, one of which is killed. Takes a minute or two; skips without Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
import pytest
from websockets.sync.client import connect

from benchmarks.serve.server import running

pytest.importorskip("ray.serve", reason="the extra [ray] is not installed")
TRIES = 20


@pytest.mark.slow
def test_a_replica_is_killed_and_no_request_is_lost(tiny_folder: Path) -> None:
    with running(["--model", str(tiny_folder), "--threads", "1", "--ray", "2"]) as process:
        statuses: Counter[int] = Counter()
        ended = time.monotonic() + 15

        def draw() -> None:
            """As behind a proxy that tries again: Ray answers 5xx for what a dead replica was at."""
            while time.monotonic() < ended:
                for _ in range(TRIES):
                    try:
                        process.draw(seed=1)
                        status = 200
                        break
                    except urllib.error.HTTPError as error:
                        status = error.code
                    except OSError:
                        status = 0
                    time.sleep(0.5)
                statuses[status] += 1

        threads = [threading.Thread(target=draw) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(3)
        replicas = [
            one for one in psutil.process_iter(["cmdline"]) if "ServeReplica:onestill" in " ".join(cmdline(one))
        ]
        assert len(replicas) == 2
        os.kill(replicas[0].pid, signal.SIGKILL)
        with connect(process.socket_url, compression=None, proxy=None) as socket:
            assert json.loads(socket.recv(timeout=60))["type"] == "ready"
            socket.send('{"id": 1, "prompt": "a"}')
            assert isinstance(socket.recv(timeout=60), bytes)
        assert urllib.request.urlopen(f"{process.url}/", timeout=60).status == 200
        for thread in threads:
            thread.join(120)
        assert set(statuses) == {200}
        assert statuses[200] > 8
        status, seconds = process.stop(signal.SIGTERM, 60)
        assert status == 0, process.errors()
        assert seconds < 30


def cmdline(process: psutil.Process) -> list[str]:
    return process.info["cmdline"] or []
