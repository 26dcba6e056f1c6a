from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from onestill.cli import main
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import KEY_FORM

Refused = Callable[..., str]


def test_the_command_makes_lists_and_revokes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    url = f"sqlite:///{tmp_path / 'serve.db'}"
    assert main(["keys", "new", "Ada", "--limit", "7/day", "--database", url]) == 0
    key = capsys.readouterr().out.strip()
    assert KEY_FORM.fullmatch(key)
    assert main(["keys", "list", "--database", url, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["keys"]
    assert (row["name"], row["daily"], row["today"], row["revoked"]) == ("Ada", 7, 0, None)
    assert row["expires"] is None
    assert main(["keys", "revoke", key, "--database", url]) == 0
    assert capsys.readouterr().out.strip() == row["id"]
    assert main(["keys", "list", "--database", url]) == 0
    assert "7 a day, 0 today, revoked" in capsys.readouterr().out
    assert main(["keys", "new", "Bob", "--expires", "2999-01-31", "--database", url]) == 0
    ledger = Ledger(url)
    ledger.add_key("Eve", None, "2020-02-01T00:00:00Z")
    ledger.close()
    capsys.readouterr()
    assert main(["keys", "list", "--database", url]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"expires 2999-02-01T00:00:00Z +Bob\n", listed)
    assert re.search(r"expired 2020-02-01T00:00:00Z +Eve\n", listed)
    assert "such as 30d" in refused("keys", "new", "Ada", "--expires", "soon", "--database", url)
    assert "no valid key" in refused("keys", "revoke", row["id"], "--database", url)
    assert "pictures a day" in refused("keys", "new", "Ada", "--limit", "many", "--database", url)
