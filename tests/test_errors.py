from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from onestill import errors
from onestill.errors import MissingExtraError, OnestillError, UnsafeFormatError, near, require

CLASSES = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_the_users_and_exits_with_two(error: type[OnestillError]) -> None:
    assert issubclass(error, OnestillError)
    assert error.exit_status == 2
    assert error.__doc__


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(errors.SizeError, ValueError)
    assert issubclass(errors.MissingExtraError, ImportError)
    assert issubclass(errors.ModelNotFoundError, LookupError)
    assert issubclass(UnsafeFormatError, errors.CheckpointError)


def test_near_finds_the_likest_name_whatever_its_case() -> None:
    assert near("icon", ["icons", "photos"]) == " Did you mean 'icons'?"
    assert near("ICONS", ["icons", "photos"]) == " Did you mean 'icons'?"
    assert near("zebra", ["icons", "photos"]) == ""
    assert near("icons", []) == ""


def test_require_imports_what_is_there() -> None:
    assert require("json", "torch").loads("[1]") == [1]
    assert require("json.decoder", "torch").JSONDecoder


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.part"])
def test_require_names_the_extra_that_is_missing(package: str) -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'onestill\[train\]'") as caught:
        require(package, "train")
    assert (caught.value.extra, caught.value.package) == ("train", package)


def test_require_does_not_hide_a_broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import a_part_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_part_that_is_missing") as caught:
        require("broken_package", "train")
    assert not isinstance(caught.value, MissingExtraError)


def test_a_missing_extra_survives_another_process() -> None:
    error = pickle.loads(pickle.dumps(MissingExtraError("torch", "diffusers")))
    assert (error.extra, error.package) == ("torch", "diffusers")
    assert str(error) == str(MissingExtraError("torch", "diffusers"))
