"""The files of a model: whether they are whole, and how they are written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from itertools import count
from pathlib import Path
from types import FrameType

import pytest

from onestill.checkpoint import (
    MANIFEST,
    cache_folder,
    verify,
    weights_file,
    written_whole,
)
from onestill.errors import CheckpointError, UnsafeFormatError


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_tiny_model_is_whole(tiny_folder: Path) -> None:
    verify(tiny_folder)
    verify(tiny_folder, contents=True)
    verify(tiny_folder, contents=True, use_stamps=False)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_truncated_weights_are_named(folder: Path, length: int, with_manifest: bool) -> None:
    if not with_manifest:
        (folder / MANIFEST).unlink()
    weights = weights_file(folder, "unet")
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"unet.*safetensors"):
        verify(folder)


def test_weights_with_something_behind_them_are_refused(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with weights_file(folder, "unet").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="not the file"):
        verify(folder)


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "openvino/unet.xml.gz", "unet/config.json"]
)
def test_one_changed_byte_is_found(folder: Path, name: str) -> None:
    verify(folder, contents=True)
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    verify(folder)
    with pytest.raises(CheckpointError, match=f"{name}.* is not the file"):
        verify(folder, contents=True)


def test_a_change_that_keeps_the_time_is_found_without_stamps(folder: Path) -> None:
    verify(folder, contents=True)
    weights = weights_file(folder, "vae")
    before = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="not the file"):
        verify(folder, contents=True, use_stamps=False)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        verify(folder)


def test_weights_that_are_only_a_pickle_are_refused(folder: Path) -> None:
    weights_file(folder, "unet").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeFormatError, match="pickle"):
        verify(folder)


@pytest.mark.parametrize("files", [{"../../etc/passwd": {}}, {"/etc/passwd": {}}, [], "all", {"README.md": 3}])
def test_a_manifest_that_reaches_outside_or_makes_no_sense_is_refused(folder: Path, files: object) -> None:
    edit_json(folder / MANIFEST, files=files)
    with pytest.raises(CheckpointError, match="lists its files"):
        verify(folder, contents=True)


def test_stamps_are_not_needed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONESTILL_CACHE", str(tmp_path / "file"))
    verify(folder, contents=True)
    monkeypatch.setenv("ONESTILL_CACHE", str(tmp_path / "cache"))
    verify(folder, contents=True)
    (stamps,) = (cache_folder() / "verified").iterdir()
    stamps.write_text("[]")
    verify(folder, contents=True)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with pytest.raises(ZeroDivisionError), written_whole(target) as unfinished:
        unfinished.write_text(f"half, {1 // 0}")
    assert list(target.parent.iterdir()) == []
    with written_whole(target) as unfinished:
        unfinished.write_text("whole")
    assert [path.read_text() for path in target.parent.iterdir()] == ["whole"]


@pytest.mark.parametrize("replace", [True, False])
def test_ctrl_c_at_any_moment_leaves_the_whole_file_or_none(tmp_path: Path, replace: bool) -> None:
    source = tmp_path / "source"
    source.write_text("whole")

    def write(folder: Path) -> None:
        with written_whole(folder / "file.txt", replace=replace) as unfinished:
            unfinished.hardlink_to(source)  # opening a file would leave it open

    def interrupted(folder: Path, moment: int) -> bool:
        """Write, with Ctrl-C at the `moment`-th of those where Python looks for signals: whether there was one."""
        moments = count()

        def interrupt(frame: FrameType, event: str, argument: object) -> None:
            if event in ("call", "c_return") and next(moments) == moment:
                raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            write(folder)
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False

    outcomes = []
    for moment in count():
        folder = tmp_path / str(moment)
        folder.mkdir()
        came = interrupted(folder, moment)
        outcomes.append([(path.name, path.read_text()) for path in folder.iterdir()])
        if not came:
            break
    assert outcomes[0] == []
    assert outcomes[-1] == [("file.txt", "whole")]
    assert all(outcome in (outcomes[0], outcomes[-1]) for outcome in outcomes), outcomes


def test_a_file_that_came_in_between_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with pytest.raises(FileExistsError), written_whole(target, replace=False) as unfinished:
        unfinished.write_text("mine" * target.write_text("theirs"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


def test_without_hard_links_an_existing_file_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "file.txt"
    for expected in ("first", "first"):
        try:
            with written_whole(target, replace=False) as unfinished:
                unfinished.write_text("first" if not target.exists() else "second")
        except FileExistsError:
            pass
        assert [path.read_text() for path in tmp_path.iterdir()] == [expected]
