"""The machine's GPUs, by what NVIDIA's tool and the kernel say; and torch's own view of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onestill.engine.gpus import Gpus, find_gpus, torch_devices, trouble_on
from tests.nvidia import no_nvidia_smi, put_nvidia_smi, says

LINUX = "Linux x86_64"
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder@host)\n"
OLD_MODULE = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine's `proc` and `dev`, with nothing in them."""
    for name in ("proc", "dev"):
        (tmp_path / "root" / name).mkdir(parents=True)
    return tmp_path / "root"


def load_driver(root: Path, version: str, models: tuple[str, ...] = ()) -> None:
    folder = root / "proc" / "driver" / "nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text(version)
    for i, model in enumerate(models):
        (folder / "gpus" / f"0000:{i:02d}:00.0").mkdir(parents=True)
        (folder / "gpus" / f"0000:{i:02d}:00.0" / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 147\n")


def test_a_machine_without_any(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_nvidia_smi(monkeypatch, tmp_path)
    assert find_gpus(root, LINUX) == Gpus(LINUX)
    assert Gpus(LINUX).nvidia_in_words == ""
    assert not Gpus(LINUX).apple
    assert find_gpus(root, "Darwin arm64").apple


def test_nvidias_tool_is_believed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, says(["NVIDIA GeForce RTX 4070 Laptop GPU"], "12.7", "566.36"))
    found = find_gpus(root, "Windows AMD64")
    assert found == Gpus("Windows AMD64", ("NVIDIA GeForce RTX 4070 Laptop GPU",), "566.36", "12.7")
    assert found.nvidia_in_words == "NVIDIA GeForce RTX 4070 Laptop GPU"


def test_several_gpus_and_a_newer_tool(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = says(["NVIDIA H200"] * 4).replace("CUDA Version ", "CUDA UMD Version ")
    put_nvidia_smi(tmp_path / "bin", monkeypatch, printed)
    found = find_gpus(root, LINUX)
    assert (found.cuda, found.nvidia_in_words) == ("13.0", "NVIDIA H200 (one of 4)")


def test_a_tool_that_fails_says_why(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.65\n"
    put_nvidia_smi(tmp_path / "bin", monkeypatch, said, status=18)
    load_driver(root, OPEN_MODULE, ("NVIDIA H200",))
    found = find_gpus(root, LINUX)
    assert found.problem == "Failed to initialize NVML: Driver/library version mismatch"
    assert (found.nvidia, found.driver, found.cuda, found.out_of_reach) == (("NVIDIA H200",), "580.65.06", "", False)


def test_a_tool_that_fails_without_a_word(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path / "bin", monkeypatch, "", status=9)
    assert find_gpus(root, LINUX).problem == "nvidia-smi fails with status 9"
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/no/such/shell\n")
    assert find_gpus(root, LINUX).problem.startswith("nvidia-smi cannot be run: ")


@pytest.mark.parametrize(("version", "driver"), [(OPEN_MODULE, "580.65.06"), (OLD_MODULE, "550.54.15")])
def test_without_the_tool_the_kernel_tells(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, driver: str
) -> None:
    no_nvidia_smi(monkeypatch, tmp_path)
    load_driver(root, version, ("NVIDIA A40", "NVIDIA A40"))
    inside = find_gpus(root, LINUX)
    assert inside.out_of_reach, "as in a container that was given none"
    assert inside.nvidia_in_words == ""
    (root / "dev" / "nvidia0").touch()
    assert find_gpus(root, LINUX) == Gpus(LINUX, ("NVIDIA A40", "NVIDIA A40"), driver)


def test_a_device_file_alone_is_a_gpu(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_nvidia_smi(monkeypatch, tmp_path)
    (root / "dev" / "nvidiactl").touch()  # which is there without a GPU too
    assert find_gpus(root, LINUX) == Gpus(LINUX)
    (root / "dev" / "nvidia3").touch()
    assert find_gpus(root, LINUX).nvidia_in_words == "NVIDIA GPU"


def test_amds_driver(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_nvidia_smi(monkeypatch, tmp_path)
    (root / "dev" / "kfd").touch()
    assert find_gpus(root, LINUX) == Gpus(LINUX, amd=True)


def test_what_torch_sees_here() -> None:
    sees = torch_devices()
    assert sees.version == torch.__version__
    assert sees.cuda == (torch.version.cuda or "")
    assert len(sees.gpus) == torch.cuda.device_count()
    assert sees.mps == torch.backends.mps.is_available()
    assert torch_devices(tries=False).gpus == sees.gpus


def test_a_device_is_tried_by_computing_on_it() -> None:
    assert trouble_on("cpu") == ""
    if not torch.xpu.is_available():
        assert "\n" not in trouble_on("xpu")
        assert trouble_on("xpu")
