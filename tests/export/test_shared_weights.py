from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from onestill.checkpoint import verify
from onestill.engine.openvino.shared_weights import read_index
from onestill.errors import CheckpointError
from onestill.export.shared_weights import export_openvino


def test_the_graphs_keep_no_second_copy_of_the_weights(tiny_folder: Path) -> None:
    for part, files in read_index(tiny_folder).items():
        assert files.rest.stat().st_size < 5000, part
        graph, space = files.content()
        assert graph.startswith(b"<?xml")
        np.testing.assert_array_equal(space[: files.weights_bytes], np.fromfile(files.weights, dtype=np.uint8))


def test_exporting_again_replaces_the_old_form(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    before = {path.name: path.read_bytes() for path in (folder / "openvino").iterdir()}
    (folder / "openvino" / "left-over").write_text("")
    export_openvino(folder)
    assert {path.name: path.read_bytes() for path in (folder / "openvino").iterdir()} == before
    verify(folder, contents=True)


def test_a_form_that_computes_something_else_is_not_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    monkeypatch.setattr("onestill.export.shared_weights.MOST_DIFFERENCE", 0.0)
    with pytest.raises(CheckpointError, match="differs from torch"):
        export_openvino(folder)
    assert not (folder / "openvino").exists()
