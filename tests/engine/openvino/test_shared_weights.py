from __future__ import annotations

import gzip
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from onestill.checkpoint import cache_folder, describe, unsealed, weights_file
from onestill.checkpoint.files import SEAL
from onestill.engine.openvino.engine import OpenVinoEngine
from onestill.errors import CheckpointError
from onestill.pipeline import Pipeline


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


@pytest.fixture
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("ONESTILL_CACHE", str(tmp_path / "cache"))
    return cache_folder() / "openvino"


def picture(folder: Path) -> np.ndarray:
    return np.asarray(Pipeline(OpenVinoEngine(describe(folder)))("a red apple", seed=5).images[0])


def test_the_second_start_reads_the_cache_and_draws_the_same(folder: Path, own_place: Path) -> None:
    first = picture(folder)
    blobs = sorted(own_place.glob("*.blob"))
    assert [blob.name.rsplit("-", 1)[0] for blob in blobs] == ["decoder", "text_encoder", "time", "unet"]
    written = [blob.stat().st_ino for blob in blobs]
    np.testing.assert_array_equal(picture(folder), first)
    assert sorted(own_place.glob("*.blob")) == blobs
    assert [blob.stat().st_ino for blob in blobs] == written, "writing again would have made new files"


@pytest.mark.parametrize("spoil", [lambda blob: blob[:100], lambda blob: b"", lambda blob: b"x" * 50 + SEAL])
def test_a_spoilt_cache_is_made_again(folder: Path, own_place: Path, spoil: object) -> None:
    first = picture(folder)
    blobs = {blob: spoil(blob.read_bytes()) for blob in own_place.glob("*.blob")}  # type: ignore[operator]
    for blob, spoilt in blobs.items():
        blob.write_bytes(spoilt)
    with pytest.warns(RuntimeWarning, match="was damaged and is compiled again"):
        np.testing.assert_array_equal(picture(folder), first)
    assert set(own_place.glob("*.blob")) == set(blobs)
    for blob, spoilt in blobs.items():
        assert blob.read_bytes() != spoilt
        assert unsealed(memoryview(blob.read_bytes())) is not None


def test_a_cache_that_cannot_be_written_is_no_reason_not_to_draw(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = picture(folder)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ONESTILL_CACHE", str(tmp_path / "file"))
    np.testing.assert_array_equal(picture(folder), expected)


def test_the_cache_does_not_grow_without_end(folder: Path, own_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.engine.openvino.compile_cache.MOST_NETWORKS", 2)
    picture(folder)
    assert len(list(own_place.glob("*.blob"))) <= 2


def test_weights_that_the_graphs_were_not_made_from_are_refused(folder: Path, own_place: Path) -> None:
    weights = weights_file(folder, "unet")
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="not the file that"):
        OpenVinoEngine(describe(folder))
    weights.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="not the file that"):
        OpenVinoEngine(describe(folder))
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        OpenVinoEngine(describe(folder))


@pytest.mark.parametrize("name", ["index.json", "unet.xml.gz", "decoder.bin"])
def test_a_missing_part_is_named(folder: Path, own_place: Path, name: str) -> None:
    (folder / "openvino" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        OpenVinoEngine(describe(folder))


def test_a_spoilt_graph_or_index_is_refused(folder: Path, own_place: Path) -> None:
    graph = folder / "openvino" / "unet.xml.gz"
    content = graph.read_bytes()
    half = gzip.compress(gzip.decompress(content)[: len(content)])
    for spoilt in (content[: len(content) // 2], b"no gzip", half):
        graph.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=r"unet\.xml"):
            OpenVinoEngine(describe(folder))
    graph.write_bytes(content)
    index = folder / "openvino" / "index.json"
    index.write_text(index.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(CheckpointError, match="another version"):
        OpenVinoEngine(describe(folder))
    index.write_text('{"format": 2, "parts": {}}')
    with pytest.raises(CheckpointError, match="damaged"):
        OpenVinoEngine(describe(folder))


def test_eight_threads_draw_what_each_would_draw_alone(tiny_folder: Path) -> None:
    pipe = Pipeline(OpenVinoEngine(describe(tiny_folder)))
    jobs = [(f"a red apple {i % 5}", i) for i in range(32)]
    alone = [np.asarray(pipe(prompt, seed=seed).images[0]) for prompt, seed in jobs]
    fresh = Pipeline(pipe.engine)
    with ThreadPoolExecutor(max_workers=8) as pool:
        together = list(pool.map(lambda job: np.asarray(fresh(job[0], seed=job[1]).images[0]), jobs))
    for expected, found in zip(alone, together, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_threads_can_be_limited(tiny_folder: Path) -> None:
    engine = OpenVinoEngine(describe(tiny_folder), threads=1)
    assert engine.encode(["a red apple"]).states.shape == (1, 16, 32)


def test_a_quick_start_draws_the_same_but_for_a_level_here_and_there(tiny_folder: Path, own_place: Path) -> None:
    info = describe(tiny_folder)
    slow, quick = (
        np.asarray(
            Pipeline(OpenVinoEngine(info, dtype="float32", quick_start=quick))("a red apple", seed=5).images[0]
        ).astype(int)
        for quick in (False, True)
    )
    assert np.abs(slow - quick).max() <= 1
    assert len(list(own_place.glob("unet-*.blob"))) == 2, "each way has a compiled network of its own"


def test_an_openvino_without_the_option_draws_as_ever(
    tiny_folder: Path, own_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = picture(tiny_folder)
    for module in ("private_api", "shared_weights"):
        monkeypatch.setattr(f"onestill.engine.openvino.{module}.UNCHAINED", {"NO_SUCH_OPTION": "DISABLE"})
    engine = OpenVinoEngine(describe(tiny_folder), quick_start=True)
    np.testing.assert_array_equal(np.asarray(Pipeline(engine)("a red apple", seed=5).images[0]), expected)


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core"])
def test_a_limit_on_onednn_s_instructions_is_heeded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert OpenVinoEngine(describe(tiny_folder)).dtype == "float32"
