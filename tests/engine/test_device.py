"""The choice of a device: from facts, and as this machine has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from onestill import load
from onestill.engine import load_engine
from onestill.engine.device import (
    automatic,
    checked_name,
    choose,
    chosen,
    default_dtype,
    explained,
    is_auto,
    is_cpu,
    peak_memory,
    runs_on_cpu,
    synchronize,
)
from onestill.engine.gpus import Gpus, TorchDevices
from onestill.engine.protocol import TorchOptions
from onestill.engine.torch.fast import FastEngine
from onestill.errors import OnestillError
from tests.tiny_sd import tiny_sd

HAS_GPU = torch.cuda.is_available() or torch.backends.mps.is_available()
TWO = TorchDevices("2.13.0+cu130", cuda="13.0", gpus=("NVIDIA H200", "NVIDIA A40"))
MAC = TorchDevices("2.13.0", mps=True)
NONE = TorchDevices("2.13.0+cpu")
OLD_CARD = TorchDevices("2.13.0+cu130", cuda="13.0", gpus=("GTX 1080",), trouble="no kernel image is available")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint, which torch draws."""
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd", "sd15")


def refusal(asked: str, sees: TorchDevices, gpus: Gpus | None = None) -> str:
    with pytest.raises(OnestillError) as caught:
        chosen(asked, sees, lambda: gpus or Gpus("Linux x86_64"), {})
    assert str(caught.value).endswith("." if "Did you" not in str(caught.value) else "?")
    return str(caught.value)


# --- from facts ---


@pytest.mark.parametrize(
    ("sees", "taken"),
    [(TWO, "cuda"), (MAC, "mps"), (NONE, "cpu"), (OLD_CARD, "cpu"), (TorchDevices("2", mps=True, trouble="x"), "cpu")],
)
def test_auto_takes_the_first_gpu_that_computes(sees: TorchDevices, taken: str) -> None:
    assert automatic(sees) == taken
    for asked in (None, "auto", " Auto "):
        assert chosen(asked, sees, Gpus, {}) == taken


def test_what_is_there_is_taken_as_asked() -> None:
    for asked in ("cuda", "cuda:0", "cuda:1", "CUDA:1"):
        assert chosen(asked, TWO, Gpus, {}) == asked.lower()
    assert chosen("mps", MAC, Gpus, {}) == "mps"
    assert chosen("cuda", OLD_CARD, Gpus, {}) == "cuda", "choose tries it, and tells what torch says"


def test_an_index_too_high_is_told_what_is_there() -> None:
    assert refusal("cuda:7", TWO) == (
        "There is no 'cuda:7' here; choose from what torch sees: 'cuda:0' (NVIDIA H200), 'cuda:1' (NVIDIA A40)."
    )


def test_cuda_without_one_says_why_and_what_to_do() -> None:
    assert refusal("cuda", NONE) == (
        "There is no 'cuda' here, as torch 2.13.0+cpu is built without CUDA, and no GPU of NVIDIA's or AMD's is to be "
        "seen; choose 'cpu', or leave the device out."
    )
    there = Gpus("Linux x86_64", ("NVIDIA H200",), "580.65.06", "13.0")
    said = refusal("cuda:1", NONE, there)
    assert "while the NVIDIA H200 is here" in said
    assert said.endswith("run `pip uninstall -y torch && pip install torch`, or choose 'cpu'.")
    assert "torch calls Apple's GPU 'mps'" in refusal("cuda", MAC, Gpus("Darwin arm64"))


def test_mps_elsewhere_than_on_a_mac() -> None:
    assert "Mac with Apple silicon; choose 'cuda', or choose 'cpu'" in refusal("mps", TWO)


@pytest.mark.parametrize("name", ["banana", "gpu", "rocm", "hip:0", "cuda:", "cuda:x", "cuda:-1", "meta", "cpu:1", ""])
def test_what_is_no_device_is_told_the_names(name: str) -> None:
    for sees in (NONE, TWO):
        said = refusal(name, sees)
        assert said.startswith(f"There is no device '{name}'; choose from auto, cpu, cuda, cuda:1 and so on, mps.")
        if name in ("gpu", "rocm", "hip:0"):
            assert said.endswith("Did you mean 'cuda'?")


def test_types_go_by_the_device() -> None:
    assert {name: default_dtype(name) for name in ("cpu", "cuda", "cuda:1", "mps", "xpu")} == {
        "cpu": "float32",
        **dict.fromkeys(("cuda", "cuda:1", "mps", "xpu"), "float16"),
    }


def test_what_the_cpu_will_do_for() -> None:
    assert all(map(runs_on_cpu, (None, "auto", "cpu", "CPU", "cpu:0")))
    assert not any(map(runs_on_cpu, ("cuda", "mps", "banana")))
    assert all(map(is_auto, (None, "auto")))
    assert not any(map(is_auto, ("cpu", "cuda")))


# --- on this machine ---


def test_the_cpu_is_always_there() -> None:
    assert [choose("cpu"), choose("CPU"), choose("cpu:0")] == ["cpu"] * 3
    assert is_cpu("cpu")
    assert not is_cpu("cuda")
    assert peak_memory("cpu") is None
    synchronize("cpu")


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_gpu_auto_is_the_cpu(real: Path) -> None:
    assert (choose(), choose("auto"), is_cpu("auto")) == ("cpu", "cpu", True)
    assert explained("cpu").startswith("torch computes on the CPU")
    engine = load_engine(None, real)
    assert (engine.name, engine.device, engine.dtype, isinstance(engine, FastEngine)) == (
        "torch",
        "cpu",
        "float32",
        False,
    )
    for name in ("cuda", "mps"):
        with pytest.raises(OnestillError, match=f"There is no '{name}' here, as "):
            load(real, device=name)


@pytest.mark.gpu
def test_with_a_gpu_auto_is_cuda(real: Path) -> None:
    assert (choose(), choose("auto"), is_cpu("auto")) == ("cuda", "cuda", False)
    assert torch.cuda.get_device_name(0) in explained("cuda")
    for asked in (None, "auto"):
        engine = load_engine(None, real, device=asked)
        assert (engine.device, engine.dtype, isinstance(engine, FastEngine)) == ("cuda", "float16", True)
    assert load(real, device="cpu").info.dtype == "float32"
    with pytest.raises(OnestillError, match="There is no 'cuda:99' here; choose from"):
        load(real, device="cuda:99")
    assert peak_memory("cuda") is not None
    synchronize("cuda")


@pytest.mark.skipif(torch.xpu.is_available(), reason="this machine has Intel's GPU")
def test_a_device_that_torch_knows_and_has_not_is_one_sentence() -> None:
    with pytest.raises(OnestillError, match=r"^torch cannot compute on 'xpu' here \(.*\); choose 'cpu'"):
        choose("xpu")


def test_a_model_in_openvinos_form_stays_there_unless_asked_otherwise(tiny_folder: Path) -> None:
    for engine in (None, "auto", "openvino"):
        for device in (None, "auto", "cpu", "CPU"):
            info = load(tiny_folder, engine=engine, device=device).info
            assert (info.engine, info.device) == ("openvino", "cpu")
    assert load(tiny_folder, engine="torch", device="cpu").info.engine == "torch"
    with pytest.raises(OnestillError, match="There is no device 'banana'"):
        load(tiny_folder, engine="openvino", device="banana")


def test_the_pipeline_says_where_it_runs(real: Path) -> None:
    pipe = load(real, device="cpu", dtype="bfloat16")
    assert (pipe.info.engine, pipe.info.device, pipe.info.dtype) == ("torch", "cpu", "bfloat16")
    engine_info: Any = pipe.engine.info
    assert {name: getattr(pipe.info, name) for name in vars(engine_info)} == vars(engine_info)


def test_on_a_cpu_cuda_graphs_are_no_reason_to_fail(real: Path) -> None:
    assert isinstance(load_engine("torch", real, "cpu", options=TorchOptions()), FastEngine)


def probe(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_drawing_without_torch_looks_for_no_gpu(tiny_folder: Path) -> None:
    code = f"""
import sys, onestill
onestill.load({str(tiny_folder)!r}, device="auto")("a red apple", seed=1)
print(*{{"torch", "onestill.engine.gpus", "onestill.engine.gpu_advice"}} & set(sys.modules))
"""
    assert probe(code).strip() == ""


def test_without_torch_names_are_still_checked() -> None:
    code = """
import sys
sys.modules["torch"] = None
from onestill.engine.device import checked_name
print(checked_name("cuda:1"), checked_name(None), checked_name("mps"))
for name in ("banana", "gpu"):
    try:
        checked_name(name)
    except Exception as error:
        print(error)
"""
    said = probe(code).splitlines()
    assert said[0] == "cuda:1 auto mps"
    assert [line.partition(";")[0] for line in said[1:]] == ["There is no device 'banana'", "There is no device 'gpu'"]
    assert checked_name("cuda:1") == "cuda:1"
