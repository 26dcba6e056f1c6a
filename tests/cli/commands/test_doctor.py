from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import onestill
from onestill.cli import main
from onestill.engine.gpus import torch_devices
from tests.nvidia import put_nvidia_smi, says


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
    for word in ("onestill", "python", "packages", "openvino", "gpus", "torch", "cache", "model", "everything works"):
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


@pytest.mark.filterwarnings("default:The cached network")  # which the command prints
def test_deep_reads_all_that_is_shipped_and_cached(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONESTILL_CACHE", str(tmp_path))
    command = ["doctor", "--model", str(tiny_folder), "--json"]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--deep", "--no-draw"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [report["deep"][name]["files"] for name in onestill.list_models()] == ["right"] * len(onestill.list_models())
    assert report["deep"]["cached"] == 4
    (file,) = (tmp_path / "openvino").glob("unet-*.blob")
    content = bytearray(file.read_bytes())
    content[1000:5096] = bytes(4096)
    file.write_bytes(content)
    assert main([*command, "--deep", "--no-draw"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "1 of 4 cached networks" in problem
    assert file.name in problem
    assert main(command) == 0  # drawing makes it anew, in one line
    assert capsys.readouterr().err == f"note: The cached network '{file.name}' was damaged and is compiled again.\n"
    assert main([*command, "--deep", "--no-draw"]) == 0


def test_a_cache_that_cannot_be_made_is_told(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["doctor", "--model", str(tiny_folder), "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["cache"]["writable"]


def test_what_auto_takes_is_told(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(tiny_folder), "--no-draw", "--json"]) == 0
    torch = json.loads(capsys.readouterr().out)["torch"]
    sees = torch_devices()
    assert (torch["version"], torch["gpus"]) == (sees.version, list(sees.gpus))
    assert torch["device"] == ("cuda" if sees.gpus else "mps" if sees.mps else "cpu")


@pytest.mark.skipif(bool(torch_devices().gpus), reason="torch uses this machine's GPU")
@pytest.mark.parametrize("as_json", [True, False])
def test_the_owner_of_an_unused_gpu_is_advised(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, says(["NVIDIA GeForce RTX 4070"]))
    assert main(["doctor", "--model", str(tiny_folder), "--no-draw", *(["--json"] if as_json else [])]) == 0
    said = capsys.readouterr().out
    if as_json:
        report = json.loads(said)
        assert report["gpus"] == {"nvidia": ["NVIDIA GeForce RTX 4070"], "driver": "580.65.06", "cuda": "13.0"}
        assert (report["ok"], report["problems"], len(report["advice"])) == (True, [], 1)
        said = report["advice"][0]
    assert "The GPU is not used, as torch" in said
    assert "NVIDIA GeForce RTX 4070" in said


def test_without_torch_a_gpus_owner_is_told_what_it_would_bring(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, says(["NVIDIA GeForce RTX 4070"]))
    command = ["doctor", "--model", str(tiny_folder), "--json"]
    code = f"import sys\nsys.modules['torch'] = None\nfrom onestill.cli import main\nsys.exit(main({command}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["torch"] is None
    assert "pip install 'onestill[torch]'" in report["advice"][0]
    assert report["picture"]["device"] == "cpu"
