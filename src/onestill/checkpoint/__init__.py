"""A model's name -> its verified local files -> what it is. Reads JSON and safetensors headers, never a pickle.

A model is a folder in diffusers' format (`model_index.json` and one folder a component), a Hub id whose files come to
such a folder, or a single safetensors file in the original key layout. One that this project made also has
`onestill.json`, the manifest: name, version, licence, defaults, and the size and SHA-256 of every file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from onestill.checkpoint.files import (
    MANIFEST,
    cache_folder,
    home,
    read_json,
    seal,
    sha256,
    unsealed,
    verify,
    weights_file,
    written_whole,
)
from onestill.checkpoint.header import PICKLE_SUFFIXES, is_pickle, pickle_error
from onestill.checkpoint.info import Additions, Lora, ModelInfo, describe
from onestill.checkpoint.presets import PRESETS
from onestill.checkpoint.single_file import ComponentFile, FileInfo, identify
from onestill.errors import CheckpointError, ModelNotFoundError, near

__all__ = [
    "MANIFEST",
    "PRESETS",
    "Additions",
    "ComponentFile",
    "FileInfo",
    "Lora",
    "ModelInfo",
    "cache_folder",
    "describe",
    "home",
    "identify",
    "list_models",
    "model_path",
    "read_json",
    "resolve",
    "seal",
    "sha256",
    "unsealed",
    "verify",
    "weights_file",
    "written_whole",
]

DEFAULT_MODEL = "icons"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def list_models() -> list[str]:
    """The names of the models that are installed with the package."""
    return sorted(folder.parent.name for folder in _shipped().glob("*/model_index.json"))


def model_path(name: str = DEFAULT_MODEL) -> Path:
    """The folder of a model that is installed with the package, in diffusers' format.

    Raises:
        ModelNotFoundError: there is none of that name.
    """
    names = list_models()
    if name not in names:
        have = f"; installed: {', '.join(names)}." if names else "; none is installed."
        raise ModelNotFoundError(f"There is no model named '{name}'{have}{near(name, names)}")
    return _shipped() / name


def resolve(name_or_path: str | os.PathLike[str] = DEFAULT_MODEL) -> Path:
    """The folder or single file of a model given by its name, path or Hub id.

    Args:
        name_or_path: the name of a shipped model; a folder in diffusers' format; a single safetensors file; or a Hub
            id, `owner/name` or `owner/name@revision`, whose files are taken from the Hub's cache or downloaded.

    Raises:
        ModelNotFoundError: there is no such name, path or id, or the Hub cannot be reached.
        UnsafeFormatError: it is a pickle.
        CheckpointError: it is a file or folder, but no model.
    """
    text = os.fspath(name_or_path)
    if text in list_models():
        return model_path(text)
    path = Path(os.path.expanduser(text))  # which pathlib fails at where there is no home
    if path.is_dir():
        return _checked_folder(path)
    if path.exists():
        return _checked_file(path)
    if HUB_ID.fullmatch(text) and not text.startswith(".") and path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        from onestill.checkpoint.hub import fetch

        return _checked_folder(fetch(text))
    if os.sep in text or path.suffix:
        raise ModelNotFoundError(
            f"There is no model at '{text}'; give a folder in diffusers' format or a .safetensors file."
        )
    return model_path(text)


def _shipped() -> Path:
    return Path(__file__).parents[1] / "models"


def _checked_folder(path: Path) -> Path:
    if (path / "model_index.json").is_file():
        return path
    pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise pickle_error(path / pickles[0])
    raise CheckpointError(
        f"'{path}' is no model: it has no model_index.json; give a folder that diffusers' save_pretrained wrote."
    )


def _checked_file(path: Path) -> Path:
    with path.open("rb") as file:
        if is_pickle(path, file.read(9)):
            raise pickle_error(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"'{path}' is a file, not a model; give a folder in diffusers' format or a .safetensors file."
        )
    return path
