from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from onestill.errors import OnestillError
from onestill.pipeline import Pipeline
from onestill.serve.access.keys import has_passed, read_expiry, read_keys
from onestill.serve.access.quota import Access
from tests.serve.client import serving


def test_keys_in_a_file_need_no_database(tiny_pipe: Pipeline, tmp_path: Path, capsys: Any) -> None:
    from onestill.cli import main

    path = tmp_path / "keys.txt"
    assert main(["keys", "new", "Ada Lovelace", "--keys", str(path)]) == 0
    key = capsys.readouterr().out.strip()
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    with serving(tiny_pipe, access=Access(read_keys(path), trial=0)) as served:
        assert served.draw().status == 401
        body = {"prompt": "a"}
        assert served.ask("POST", "/v1/images/generations", body, {"authorization": f"Bearer {key}"}).status == 200
    (tmp_path / "bad.txt").write_text("os-12345678-nothashed\n")
    with pytest.raises(OnestillError, match="Line 1"):
        read_keys(tmp_path / "bad.txt")


def test_a_key_in_a_file_may_expire(tmp_path: Path, capsys: Any) -> None:
    from onestill.cli import main

    path = tmp_path / "keys.txt"
    assert main(["keys", "new", "for ever", "--keys", str(path)]) == 0
    assert main(["keys", "new", "Ada Lovelace", "--expires", "2999-01-31", "--keys", str(path)]) == 0
    assert main(["keys", "new", "expires=never", "--keys", str(path)]) == 2
    capsys.readouterr()
    assert [(key.name, key.expires) for key in read_keys(path).values()] == [
        ("for ever", None),
        ("Ada Lovelace", "2999-02-01T00:00:00Z"),
    ]
    text = path.read_text()
    for wrong in ("expires=2999", "expires=2999-02-01T00:00:00Z", "expires=soon Ada"):
        path.write_text(text.replace("expires=2999-02-01T00:00:00Z Ada Lovelace", wrong))
        with pytest.raises(OnestillError, match="Line 2"):
            read_keys(path)


@pytest.mark.parametrize(("text", "hours"), [("12h", 12), ("30d", 720), (" 2w ", 336), (None, None)])
def test_a_span_until_a_key_expires(text: str | None, hours: int | None) -> None:
    found = read_expiry(text)
    if hours is None:
        assert found is None
        return
    assert found is not None
    left = datetime.fromisoformat(found) - datetime.now(UTC)
    assert 0 <= hours * 3600 - left.total_seconds() < 60
    assert not has_passed(found)


@pytest.mark.parametrize("text", ["", "30", "0d", "1m", "1 d", "2026-13-01", "2020-01-01", "9999-12-31", "²d"])
def test_an_expiry_that_is_none(text: str) -> None:
    with pytest.raises(OnestillError, match=r"is not understood|has passed"):
        read_expiry(text)


def test_a_date_is_the_last_day() -> None:
    today = datetime.now(UTC).date()
    found = read_expiry(today.isoformat())
    assert found == f"{today + timedelta(days=1)}T00:00:00Z"
