from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from onestill.errors import OnestillError
from onestill.pipeline import Pipeline
from onestill.serve.access.keys import Key, hash_of, new_key
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import Access
from tests.serve.client import answer_on, serving
from tests.serve.postgres import postgres

DAY = "2026-11-24"


def test_what_is_counted_survives_a_restart(url: str) -> None:
    ledger = Ledger(url)
    key_id, key = ledger.add_key("me", 5)
    secret = ledger.secret()
    assert ledger.spend([(f"key:{key_id}", 5)], 4, DAY)
    ledger.close()
    again = Ledger(url)
    found = again.find_key(key_id)
    assert found == Key(key_id, "me", hash_of(key), 5)
    assert again.used([f"key:{key_id}"], DAY) == {f"key:{key_id}": 4}
    assert again.secret() == secret
    assert not again.spend([(f"key:{key_id}", 5)], 2, DAY)
    assert again.spend([(f"key:{key_id}", 5)], 1, DAY)
    again.close()


def test_all_accounts_are_counted_or_none(ledger: Ledger) -> None:
    assert ledger.spend([("a", 9), ("b", 2)], 2, DAY)
    assert not ledger.spend([("a", 9), ("b", 2)], 1, DAY)
    assert not ledger.spend([("c", 1)], 2, DAY)
    assert ledger.used(["a", "b", "c"], DAY) == {"a": 2, "b": 2}


def test_two_servers_on_one_database_never_take_the_last_twice(url: str) -> None:
    check_last_taken_once(url)


def test_keys_are_hashed_at_rest_and_the_file_is_its_owners(url: str, tmp_path: Path) -> None:
    ledger = Ledger(url)
    key = ledger.add_key("me", None)[1]
    ledger.close()
    assert key.rsplit("-", 1)[1].encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert (tmp_path / "serve.db").stat().st_mode & 0o077 == 0


def test_a_database_that_breaks_is_503(tiny_pipe: Pipeline, url: str, tmp_path: Path) -> None:
    ledger = Ledger(url)
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=5)) as served:
        assert served.draw().status == 200
        ledger.close()
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / "serve.db").write_bytes(b"not a database at all" * 100)
        answer = served.draw()
        assert (answer.status, answer.error["code"]) == (503, "ledger_unavailable")
        assert "retry-after" in answer.headers
        headers = {"authorization": f"Bearer {new_key()[1]}"}
        with served.live(ready=False, additional_headers=headers) as socket:
            assert answer_on(socket)[0]["error"]["code"] == "ledger_unavailable"
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(timeout=20)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013


@pytest.mark.parametrize("wrong", ["nonsense", "mysql://a@b/c", "sqlite:////no/such/folder/x.db", "://"])
def test_a_database_that_is_none(wrong: str) -> None:
    with pytest.raises(OnestillError, match=r"database|supported"):
        Ledger(wrong)


def test_the_ledger_on_postgresql() -> None:
    pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")
    with postgres() as url:
        check_last_taken_once(url)


def check_last_taken_once(url: str) -> None:
    """Two servers spend from one database at once."""
    ledgers = [Ledger(url), Ledger(url)]
    taken: list[bool] = []

    def take(ledger: Ledger) -> None:
        for _ in range(30):
            taken.append(ledger.spend([("a", 40), ("b", 1000)], 1, DAY))

    threads = [threading.Thread(target=take, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 40
    assert ledgers[0].used(["a", "b"], DAY) == {"a": 40, "b": 40}
    assert ledgers[0].secret() == ledgers[1].secret()
    for ledger in ledgers:
        ledger.close()


def test_a_database_that_is_newer_is_told(url: str) -> None:
    with closing(Ledger(url)) as ledger, ledger.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(OnestillError, match="database"):
        Ledger(url)
