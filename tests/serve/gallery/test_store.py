from __future__ import annotations

import http.client
import io
import json
import signal
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from benchmarks.serve.server import running
from onestill.serve.access.ledger import Ledger
from onestill.serve.errors import ApiError
from onestill.serve.gallery.store import DAY_MS, Gallery, Rules
from tests.serve.client import kept
from tests.serve.postgres import postgres

ROW: dict[str, Any] = {
    "address": "here",
    "prompt": "a",
    "seed": 1,
    "num_inference_steps": 1,
    "width": 32,
    "height": 32,
}


def test_the_gallery_is_bounded(url: str) -> None:
    with closing(Ledger(url)) as ledger:
        gallery = Gallery(ledger, Rules(each=2, most=10, most_bytes=1000, file_bytes=300))

        def code(file: bytes, owner: str, address: str = "here") -> str | None:
            try:
                gallery.add(file, owner=owner, **ROW | {"address": address})
            except ApiError as error:
                return error.code
            return None

        assert code(b"x" * 301, "a") == "too_large"
        assert [code(b"x", "a") for _ in range(3)] == [None, None, "gallery_share_full"]
        assert [code(b"x", owner) for owner in "bbccddee"] == [None] * 6 + ["gallery_share_full"] * 2  # of one address
        assert code(b"x", "f", "there") is None
        assert code(b"x", "f", "there") is None
        assert code(b"x", "g", "elsewhere") == "gallery_full"
        for entry in gallery.page(10):
            assert gallery.remove(entry.id)
        assert [code(b"x" * 300, owner, owner) for owner in "abcd"] == [None] * 3 + ["gallery_full"]
        assert code(b"x" * 100, "k", "") is None


def test_what_expired_or_was_deleted_leaves_nothing_behind(url: str, tmp_path: Path) -> None:
    now = [1_000_000.0]
    with closing(Ledger(url)) as ledger:
        gallery = Gallery(ledger, Rules(days=3), clock=lambda: now[0])
        first = gallery.add(b"FIRST" * 2000, owner="a", **ROW | {"prompt": "words of the first"})
        second = gallery.add(b"SECOND" * 2000, owner="a", **ROW)
        assert first.expires_ms - first.made_ms == 3 * DAY_MS
        assert b"FIRST" in kept(tmp_path)
        assert gallery.remove(first.id)
        assert not gallery.remove(first.id)
        for trace in (b"FIRST", b"words of the first", first.id.encode()):
            assert trace not in kept(tmp_path)
        assert gallery.file(second.id) == b"SECOND" * 2000
        now[0] += 3 * DAY_MS / 1000
        assert (gallery.page(9), gallery.find(second.id), gallery.file(second.id)) == ([], None, None)
        assert gallery.forget_expired() == 1
        assert b"SECOND" not in kept(tmp_path)


def test_the_last_place_is_taken_once(url: str) -> None:
    check_last_place([Ledger(url), Ledger(url)])


def test_the_gallery_on_postgresql() -> None:
    pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")
    with postgres() as url:
        check_last_place([Ledger(url), Ledger(url)])


def check_last_place(ledgers: list[Ledger]) -> None:
    """Two servers fill one gallery; then a page, a file and a deletion."""
    galleries = [Gallery(ledger, Rules(most=12)) for ledger in ledgers]
    refused: list[str] = []

    def fill(gallery: Gallery, name: str) -> None:
        for _ in range(10):
            try:
                gallery.add(name.encode(), owner=name, **ROW)
            except ApiError as error:
                refused.append(error.code)

    threads = [threading.Thread(target=fill, args=pair) for pair in zip(galleries, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == ["gallery_full"] * 8
    first, *rest = galleries[0].page(5)
    found = [first, *rest, *galleries[1].page(20, (rest[-1].made_ms, rest[-1].id))]
    assert len({entry.id for entry in found}) == 12
    assert galleries[1].file(first.id) == first.owner.encode()
    assert galleries[1].remove(first.id)
    assert galleries[0].find(first.id) is None
    for ledger in ledgers:
        ledger.close()


@pytest.mark.slow
def test_a_kill_leaves_whole_pictures_only(tiny_folder: Path, url: str) -> None:
    options = ["--model", str(tiny_folder), "--threads", "1", "--gallery", "--database", url]
    with closing(Ledger(url)) as ledger:
        key = ledger.add_key("me", None)[1]
    answered: list[str] = []
    with running(options) as process:

        def save() -> None:
            body = json.dumps({"prompt": "a", "consent": True}).encode()
            headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
            request = urllib.request.Request(f"{process.url}/v1/gallery", body, headers)
            try:
                while True:
                    answered.append(json.load(urllib.request.urlopen(request, timeout=30))["id"])
            except (OSError, ValueError, http.client.HTTPException):  # wherever in an answer the kill fell
                return

        threads = [threading.Thread(target=save) for _ in range(3)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(answered) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.stop(signal.SIGKILL)
        for thread in threads:
            thread.join(60)
    with closing(Ledger(url)) as ledger:
        gallery = Gallery(ledger)
        found = {entry.id for entry in gallery.page(100)}
        assert set(answered) <= found
        assert len(answered) >= 4
        for name in found:
            PIL.Image.open(io.BytesIO(gallery.file(name) or b"")).load()


def test_the_operator_lists_and_removes(url: str, capsys: Any) -> None:
    from onestill.cli import main

    with closing(Ledger(url)) as ledger:
        entry = Gallery(ledger).add(b"x", owner="a", **ROW)
    assert main(["gallery", "list", "--database", url]) == 0
    assert entry.id in capsys.readouterr().out
    assert main(["gallery", "list", "--database", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"][0]["prompt"] == "a"
    assert main(["gallery", "remove", entry.id, "--database", url]) == 0
    assert main(["gallery", "remove", entry.id, "--database", url]) == 2
    assert "There is no picture" in capsys.readouterr().err
