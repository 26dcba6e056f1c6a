from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import numpy
import pytest

import onestill
from onestill.cli import main


def test_all_is_well_with_a_whole_model(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(tiny_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["problems"] == []
    assert report["onestill"] == onestill.__version__
    assert report["python"]["version"] == platform.python_version()
    assert report["packages"]["numpy"] == numpy.__version__
    assert report["cpu"]["cores"] >= 1
    assert "FP32" in report["openvino"]["CPU"]["fast"]
    assert report["model"]["files"] == "right"
    assert report["picture"]["size"] == "32x32"
    assert report["picture"]["again_ms"] > 0


def test_the_table_says_the_same(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(tiny_folder), "--no-draw"]) == 0
    said = capsys.readouterr().out
    for word in ("onestill", "python", "packages", "openvino", "cache", "model", "all is well"):
        assert word in said
    assert "picture" not in said


def test_a_broken_model_is_a_problem_and_two(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "broken"))
    (folder / "vae" / "config.json").unlink()
    assert main(["doctor", "--model", str(folder), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert "vae/config.json" in report["problems"][0]
    assert "picture" not in report
    assert main(["doctor", "--model", str(folder)]) == 2
    assert "problem:" in capsys.readouterr().out


def test_a_cache_that_cannot_be_made_is_told(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["doctor", "--model", str(tiny_folder), "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["cache"]["writable"]
