"""What GPUs there are: those of the machine, found without torch, and those that an installed torch computes on."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

from onestill.errors import require

TOOL = "nvidia-smi"
MOST_S = 20  # that the tool may take: on a server of many GPUs that nobody has woken, seconds


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a machine shows without torch. The default is a machine that shows none.

    Attributes:
        platform: system and processor, such as "Linux x86_64", "Windows AMD64" or "Darwin arm64".
        nvidia: the name of each of NVIDIA's, as its driver names them.
        driver: the version of NVIDIA's driver, "" where none is loaded or its version is unknown.
        cuda: the newest CUDA that this driver runs, such as "12.4"; "" where it is unknown.
        problem: what NVIDIA's tool said where it failed, "" where it did not.
        out_of_reach: NVIDIA's driver is loaded, but this process has no file of a GPU: a container without one.
        amd: whether AMD's driver for computing is loaded.
    """

    platform: str = ""
    nvidia: tuple[str, ...] = ()
    driver: str = ""
    cuda: str = ""
    problem: str = ""
    out_of_reach: bool = False
    amd: bool = False

    @property
    def apple(self) -> bool:
        """Whether this is Apple silicon, whose GPU torch computes on by MPS."""
        return self.platform == "Darwin arm64"

    @property
    def nvidia_in_words(self) -> str:
        """Such as "NVIDIA H200" or "NVIDIA H200 (one of 4)"; "" where there is none in reach."""
        if not self.nvidia or self.out_of_reach:
            return ""
        return self.nvidia[0] if len(self.nvidia) == 1 else f"{self.nvidia[0]} (one of {len(self.nvidia)})"


@dataclass(frozen=True)
class TorchDevices:
    """What an installed torch sees.

    Attributes:
        version: torch's.
        cuda: the CUDA that it is built for, such as "13.0"; "" where it is built without.
        rocm: the ROCm that it is built for, likewise.
        gpus: the names of the GPUs that it calls cuda:0, cuda:1 and so on.
        mps: whether it sees Apple's GPU.
        trouble: why it cannot compute on the first of its GPUs, or what it said of seeing none; "" where it can.
    """

    version: str
    cuda: str = ""
    rocm: str = ""
    gpus: tuple[str, ...] = ()
    mps: bool = False
    trouble: str = ""


# --- the machine's --------------------------------------------------------------------------------------------------


def find_gpus(root: Path = Path("/"), on: str | None = None) -> Gpus:
    """Look for the machine's GPUs. Runs `nvidia-smi` where it is installed, which takes up to a second.

    Args:
        root: where `proc` and `dev` are.
        on: as `Gpus.platform`; None is this machine's.
    """
    names, driver = _from_kernel(root)
    has_files = any((root / "dev").glob("nvidia[0-9]*"))
    if not names and has_files:
        names = ("NVIDIA GPU",)
    cuda = problem = ""
    if (tool := shutil.which(TOOL)) is not None:
        said, problem = _from_tool(tool)
        # Where the tool works, its GPUs are those in reach, in a container or under WSL too.
        reached = tuple(re.findall(r"^\s*Product Name\s*:\s*(.+?)\s*$", said, re.MULTILINE))
        names, has_files = reached or names, has_files or bool(reached)
        driver = _fact("Driver Version", said) or driver
        cuda = _fact(r"CUDA (?:\w+ )?Version", said)
    return Gpus(
        on or f"{platform.system()} {platform.machine()}",
        names,
        driver,
        cuda,
        problem,
        out_of_reach=bool(driver) and not has_files and not problem,
        amd=(root / "dev" / "kfd").exists(),
    )


def _from_kernel(root: Path) -> tuple[tuple[str, ...], str]:
    """The names of NVIDIA's GPUs and the version of its driver, as Linux's kernel names them."""
    folder = root / "proc" / "driver" / "nvidia"
    names = [_fact("Model", _text(file)) for file in sorted(folder.glob("gpus/*/information"))]
    version = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _text(folder / "version"))
    return tuple(name or "NVIDIA GPU" for name in names), version[1] if version else ""


def _from_tool(tool: str) -> tuple[str, str]:
    """What the tool prints, and what it says is wrong, "" if nothing is."""
    try:
        done = subprocess.run([tool, "-q"], capture_output=True, text=True, errors="replace", timeout=MOST_S)
    except subprocess.TimeoutExpired:
        return "", f"{TOOL} gives no answer"
    except OSError as error:
        return "", f"{TOOL} cannot be run: {error.strerror}"
    if done.returncode == 0:
        return done.stdout, ""
    return "", _first_line(done.stdout + done.stderr) or f"{TOOL} fails with status {done.returncode}"


def _fact(name: str, text: str) -> str:
    found = re.search(rf"^\s*{name}\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return found[1] if found else ""


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


# --- torch's --------------------------------------------------------------------------------------------------------


def torch_devices(*, tries: bool = True) -> TorchDevices:
    """What the installed torch sees. Imports it, which takes seconds.

    Args:
        tries: compute something on the first GPU, which takes a moment and some of its memory.

    Raises:
        MissingExtraError: torch is not installed.
    """
    torch = require("torch", "torch")
    names: tuple[str, ...] = ()
    trouble = ""
    with warnings.catch_warnings(record=True) as said:  # torch warns of drivers and cards that are too old
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                names = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        except RuntimeError as error:
            trouble = _first_line(error)
    mps = bool(torch.backends.mps.is_available())
    if not names and not trouble and said:
        trouble = _first_line(said[-1].message)
    if tries and (names or mps):
        trouble = trouble_on("cuda" if names else "mps")
    rocm = getattr(torch.version, "hip", None)
    return TorchDevices(torch.__version__, torch.version.cuda or "", rocm or "", names, mps, trouble)


def trouble_on(device: str) -> str:
    """Why torch cannot compute on a device, "" where it can: it also sees GPUs that are full, or too old for it."""
    torch = require("torch", "torch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they would say is found out here
            (torch.ones(2, device=device) + 1).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return _first_line(error) or type(error).__name__
    return ""


def _first_line(said: object) -> str:
    return next((line.strip().rstrip(".") for line in str(said).splitlines() if line.strip()), "")
