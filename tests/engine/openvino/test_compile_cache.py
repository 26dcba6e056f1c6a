from __future__ import annotations

import locale
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import shared_core

import numpy as np
import openvino
import pytest
from openvino import opset13

from onestill.engine.openvino.compile_cache import compile_into_folder, damaged, network_key
from onestill.pipeline import load

CONFIG = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A network of one product."""
    x = opset13.parameter([2, 16], np.float32, name="x")
    weights = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    openvino.save_model(openvino.Model([opset13.matmul(x, weights, False, False)], [x]), tmp_path / "unet.xml", False)
    return tmp_path / "unet.xml"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("ONESTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino-sd"


def run(source: Path, **config: Any) -> Any:
    core = shared_core()
    options, weights = CONFIG | config, source.with_suffix(".bin")
    key = network_key(core, options, str(weights.stat().st_mtime_ns))
    model = core.read_model(source)
    compiled = compile_into_folder(core, f"unet-{key}", options, model, weights.stat().st_size)
    return np.array(compiled([np.ones((2, 16), np.float32)])[0])


def blobs(kept: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in kept.glob("*/*.blob")}


def test_the_second_start_reads_what_the_first_one_compiled(source: Path, kept: Path) -> None:
    first = run(source)
    before = blobs(kept)
    (written,) = before
    assert written.parent.name.startswith("unet-")
    np.testing.assert_array_equal(run(source), first)
    assert blobs(kept) == before, "written again"
    run(source, INFERENCE_NUM_THREADS=1)
    assert len(blobs(kept)) == 2, "other options are another network"


@pytest.mark.parametrize("part", [0, 0.5, 0.95])
def test_what_is_damaged_is_compiled_again(source: Path, kept: Path, part: float) -> None:
    first = run(source)
    (file,) = blobs(kept)
    whole = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(whole[: int(len(whole) * part)])
    with pytest.warns(RuntimeWarning, match="was damaged and is compiled again"):
        np.testing.assert_array_equal(run(source), first)
    np.testing.assert_array_equal(run(source), first)  # without a word


@pytest.mark.parametrize("sums", [True, False])
def test_zeros_in_a_large_network_are_found(source: Path, kept: Path, sums: bool) -> None:
    first = run(source)
    (file,) = blobs(kept)
    damage_file(file.parent / "sums.json" if sums else file)
    assert damaged() == (1, [file.parent])
    with pytest.warns(RuntimeWarning, match="compiled again"):
        np.testing.assert_array_equal(run(source), first)
    assert damaged() == (1, [])


def test_a_large_network_that_was_copied_is_read_once_more(source: Path, kept: Path) -> None:
    run(source)
    (file,) = blobs(kept)
    os.utime(file, (0, 0))
    stamps = (file.parent / "sums.json").read_text()
    run(source)
    assert (file.parent / "sums.json").read_text() != stamps
    os.utime(kept / file.parent.name)
    before = blobs(kept)
    run(source)
    assert blobs(kept) == before


def damage_file(file: Path) -> None:
    """Zeros in the middle of a file, which keeps its size and the time of its last change."""
    facts, content = file.stat(), bytearray(file.read_bytes())
    start = len(content) // 3
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    file.chmod(0o600)
    file.write_bytes(content)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "decoder", "time"])
def test_zeros_in_a_network_change_no_picture(
    tiny_folder: Path, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONESTILL_CACHE", str(tmp_path))

    def draw() -> Any:
        return np.asarray(load(tiny_folder, engine="openvino")("a red star", seed=1).images[0])

    first = draw()
    (file,) = (tmp_path / "openvino").glob(f"{part}-*.blob")
    for damage in (damage_file, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no network")):
        damage(file)
        count, wrong = damaged()
        assert (count, wrong) == (4, [file])
        with pytest.warns(RuntimeWarning, match=f"'{file.name}' was damaged and is compiled again"):
            np.testing.assert_array_equal(draw(), first)
        assert damaged() == (4, [])
    np.testing.assert_array_equal(draw(), first)  # without a word


def test_other_weights_are_another_network(source: Path, kept: Path) -> None:
    first = run(source)
    weights = source.with_suffix(".bin")
    weights.write_bytes((-np.frombuffer(weights.read_bytes(), np.float32)).tobytes())
    np.testing.assert_array_equal(run(source), -first)
    assert len(blobs(kept)) == 2


def test_without_room_nothing_is_kept(source: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.engine.openvino.compile_cache.ROOM", 1e18)
    run(source)
    assert list(kept.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_reason_not_to_draw(source: Path, kept: Path) -> None:
    kept.parent.mkdir()
    kept.write_text("in the way")
    assert run(source).shape == (2, 8)


def test_what_is_kept_does_not_grow_without_end(source: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, growing = kept / ".0123.part", kept / ".4567.part"
    left.mkdir(parents=True)
    growing.mkdir()
    os.utime(left, (0, 0))  # of a process that was killed
    monkeypatch.setattr("onestill.engine.openvino.compile_cache.MOST_BYTES", 0)
    run(source)
    assert list(kept.iterdir()) == [growing]


def test_a_network_that_cannot_be_compiled_says_so(source: Path, kept: Path) -> None:
    with pytest.raises(RuntimeError, match="NO_SUCH_OPTION"):
        run(source, NO_SUCH_OPTION=1)
    assert list(kept.iterdir()) == []


def test_many_at_once_leave_the_process_its_locale(source: Path, kept: Path) -> None:
    before = locale.setlocale(locale.LC_ALL)
    with ThreadPoolExecutor(8) as pool:  # OpenVINO's cache works in the locale "C"
        list(pool.map(lambda i: run(source, INFERENCE_NUM_THREADS=1 + i % 8), range(32)))
    assert locale.setlocale(locale.LC_ALL) == before
