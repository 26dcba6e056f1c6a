from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onestill.cli import main
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
    assert main(["keys", "revoke", key, "--database", url]) == 0
    assert capsys.readouterr().out.strip() == row["id"]
    assert main(["keys", "list", "--database", url]) == 0
    assert "7 a day, 0 today, revoked" in capsys.readouterr().out
    assert "no valid key" in refused("keys", "revoke", row["id"], "--database", url)
    assert "pictures a day" in refused("keys", "new", "Ada", "--limit", "many", "--database", url)
