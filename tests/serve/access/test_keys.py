from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onestill.errors import OnestillError
from onestill.pipeline import Pipeline
from onestill.serve.access.keys import read_keys
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
