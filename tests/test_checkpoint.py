from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from itertools import count
from pathlib import Path
from types import FrameType

import pytest

import onestill
from onestill.checkpoint import (
    MANIFEST,
    _shipped,
    cache_folder,
    describe,
    list_models,
    model_path,
    resolve,
    verify,
    weights_file,
    written_whole,
)
from onestill.errors import CheckpointError, ModelNotFoundError, UnsafeFormatError


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- finding ---


def test_every_shipped_model_has_a_folder_that_verifies() -> None:
    for name in list_models():
        assert resolve(name) == model_path(name)
        verify(model_path(name), contents=True, use_stamps=False)
        assert describe(model_path(name)).name == name


def test_shipped_models_lie_in_the_package() -> None:
    assert _shipped() == Path(onestill.__file__).parent / "models"


def test_a_folder_is_found_by_its_path(tiny_folder: Path) -> None:
    assert resolve(tiny_folder) == tiny_folder
    assert resolve(str(tiny_folder)) == tiny_folder


def test_a_wrong_name_gets_the_near_one(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    monkeypatch.setattr("onestill.checkpoint._shipped", lambda: tiny_folder.parent)
    assert list_models() == ["tiny"]
    with pytest.raises(ModelNotFoundError, match="Did you mean 'tiny'"):
        resolve("tinny")


@pytest.mark.parametrize(
    "name", ["../tiny", "nowhere/at/all", "./missing", "gone.safetensors", "owner/gone.safetensors"]
)
def test_a_path_that_is_not_there_is_one_sentence(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"give a folder in diffusers' format"):
        resolve(name)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model_index"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.safetensors", "model"])
def test_a_pickle_is_refused_by_its_bytes_whatever_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"weights": [1.0]}))
    with pytest.raises(UnsafeFormatError, match="pickle"):
        resolve(tmp_path / name)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="no model but of the kind: unknown"):
        describe(resolve(tmp_path / "model.safetensors"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="not a model"):
        resolve(tmp_path / "notes.txt")


def test_a_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsafeFormatError):
        resolve(tmp_path)


# --- describing ---


def test_what_a_model_is(tiny_folder: Path) -> None:
    info = describe(tiny_folder)
    assert (info.name, info.version, info.licence) == ("tiny", "1", "Apache-2.0")
    assert (info.height, info.width, info.sizes) == (32, 32, ((32, 32),))
    assert (info.latent_shape, info.vae_scale_factor, info.scaling_factor) == ((4, 4, 4), 8, 0.5)
    assert (info.max_tokens, info.use_attention_mask, info.sampler) == (16, False, "euler_ancestral")
    assert info.schedule.prediction_type == "v_prediction"
    assert info.schedule.alphas_cumprod[-1] == 0
    assert info.schedule.timesteps(1) == [999]
    assert info.made == {"by": "tests/tiny.py"}


def test_a_model_without_a_manifest_takes_its_folders_name(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    info = describe(folder)
    assert (info.name, info.num_inference_steps, info.guidance_scale) == (folder.name, 1, 1.0)


def test_another_kind_of_pipeline_is_refused(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(CheckpointError, match="FluxPipeline"):
        describe(folder)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_spoilt_config_is_named(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.rsplit("/", 1)[-1]):
        describe(folder)


def test_configs_that_do_not_fit_together_are_one_sentence(folder: Path) -> None:
    edit_json(folder / "vae/config.json", block_out_channels=None)
    with pytest.raises(CheckpointError, match="do not fit together"):
        describe(folder)


def test_a_schedule_that_cannot_be_drawn_with_is_refused(folder: Path) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", beta_schedule="mystery")
    with pytest.raises(CheckpointError, match="mystery"):
        describe(folder)


# --- verifying ---


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


# --- writing ---


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
