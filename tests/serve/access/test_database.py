from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from onestill.pipeline import Pipeline
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import Access
from onestill.serve.errors import Unavailable
from tests.serve.client import serving


def test_a_locked_database_is_said_at_once_and_survived(tiny_pipe: Pipeline, url: str, tmp_path: Path) -> None:
    access = Access(ledger=Ledger(url), trial=1000)
    with serving(tiny_pipe, access=access) as served, closing(sqlite3.connect(tmp_path / "serve.db")) as other:
        assert served.draw(seed=1).status == 200
        assert served.ask("GET", "/readyz").status == 200
        other.execute("BEGIN IMMEDIATE")
        answers: list[tuple[int, str]] = []

        def draw() -> None:
            answer = served.draw(seed=1)
            answers.append((answer.status, answer.error["code"]))

        started = time.monotonic()
        threads = [threading.Thread(target=draw) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [(503, "ledger_unavailable")] * 30
        assert time.monotonic() - started < 10  # a second, where each of them would wait for one
        ready = served.ask("GET", "/readyz")
        assert (ready.status, "database" in ready.error["message"]) == (503, True)
        assert served.ask("GET", "/healthz").status == 200
        other.rollback()
        deadline = time.monotonic() + 20
        while served.draw(seed=1).status != 200 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert served.ask("GET", "/readyz").status == 200


def test_only_one_call_a_second_waits_for_a_lock(url: str, tmp_path: Path) -> None:
    with closing(Ledger(url)) as ledger, closing(sqlite3.connect(tmp_path / "serve.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        waits = []
        for _ in range(20):
            started = time.monotonic()
            with pytest.raises(Unavailable):
                ledger.find_key("abc")
            waits.append(time.monotonic() - started)
        assert sum(wait > 0.5 for wait in waits) <= 2
        other.rollback()
        time.sleep(1.1)
        assert ledger.find_key("abc") is None


FILL = """
import errno, os, sys
from pathlib import Path
from onestill.errors import OnestillError
from onestill.serve.access.ledger import Ledger
from onestill.serve.errors import Unavailable
from onestill.serve.gallery.store import Gallery, Rules

folder, now = Path(sys.argv[1]), [1e9]
row = dict(address="here", prompt=None, seed=1, num_inference_steps=1, width=8, height=8)

def fill():
    with open(folder / "ballast", "ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)): pass
        except OSError as error:
            assert error.errno == errno.ENOSPC

def opened():
    ledger = Ledger(f"sqlite:///{folder}/serve.db")
    return ledger, Gallery(ledger, Rules(each=99, days=3), clock=lambda: now[0])

ledger, gallery = opened()
key_id, _ = ledger.add_key("a", None)
names = [gallery.add(os.urandom(900_000), owner="a", **row).id for _ in range(9)]
fill()
for attempt in (lambda: gallery.add(os.urandom(900_000), owner="a", **row), lambda: ledger.spend([("a", 5)], 1, "x")):
    try:
        attempt()
    except Unavailable as error:
        assert "disk is full" in str(error), error
    else:
        # what found a little room left in the file; then there is none
        fill()
for name in names[:2]:
    assert gallery.remove(name)
    fill()
assert ledger.revoke_key(key_id)
fill()
ledger.close()
ledger, gallery = opened()  # a start on a full disk
assert ledger.find_key(key_id) is None
assert len(gallery.page(20)) >= 7
now[0] += 4 * 24 * 3600
assert gallery.forget_expired() >= 7
assert gallery.page(20) == []
(folder / "ballast").unlink()
assert gallery.add(b"x", owner="a", **row)
assert (folder / "serve.db-spare").stat().st_size == 8 * 2**20
print("survived")
"""


def test_a_full_disk_leaves_room_for_deletions(tmp_path: Path) -> None:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("a small file system can be mounted on Linux alone")
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=40m none "$1" && shift && exec "$@"', "sh"]
    if subprocess.run([*mount, str(tmp_path), "true"], stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    command = [*mount, str(tmp_path), sys.executable, "-c", FILL, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "survived\n", ended.stderr
