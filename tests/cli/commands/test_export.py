from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onestill import load
from onestill.checkpoint import verify
from onestill.cli import main

Refused = Callable[..., str]


def test_a_copy_gets_the_openvino_form_and_draws_the_same(tiny_folder: Path, here: Path) -> None:
    bare = here / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("openvino", "onestill.json"))
    assert main(["export", "--model", str(bare), "--out", "new/exported"]) == 0
    assert not (bare / "openvino").exists()
    assert sorted(path.name for path in (here / "new").iterdir()) == ["exported"]
    ours, first = (load(folder)("a star", seed=1).images[0] for folder in ("new/exported", tiny_folder))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(first))


def test_the_manifest_is_made_anew(tiny_folder: Path, here: Path) -> None:
    assert main(["export", "--model", str(tiny_folder), "--out", "exported"]) == 0
    verify("exported", contents=True, use_stamps=False)
    assert load("exported").info.version == "1"


def test_mistakes_are_one_line(
    refused: Refused, tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "exists" in refused("export", "--model", tiny_folder, "--out", here)
    assert "Did you mean 'openvino'?" in refused("export", "--to", "openvin", "--out", "x")
    assert "no model" in refused("export", "--model", "nothing", "--out", "x")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'onestill[torch]'" in refused("export", "--model", tiny_folder, "--out", "x")
    assert list(here.iterdir()) == []
