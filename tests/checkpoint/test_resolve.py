"""A model's name, path or Hub id -> its files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

import onestill
from onestill.checkpoint import (
    _shipped,
    describe,
    list_models,
    model_path,
    resolve,
    verify,
)
from onestill.errors import CheckpointError, ModelNotFoundError, UnsafeFormatError


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
