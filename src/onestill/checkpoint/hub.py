"""Hub ids -> the folder of their files in the Hub client's own cache. Needs the extra `hub`.

What is in the cache is used as it is, and never looked up again: the first download pins the commit. Only configs,
tokenizers and safetensors are downloaded, in half precision where the model has that. The cache names each large file
by its SHA-256, so files are checked against that, offline too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onestill.checkpoint.files import NETWORKS, check_contents, verify
from onestill.errors import CheckpointError, MissingExtraError, ModelNotFoundError, require

SHA256 = re.compile(r"[0-9a-f]{64}")
SMALL = re.compile(r"(model_index\.json|scheduler/\S+\.json|tokenizer(_2)?/[\w.]+\.(json|txt))")
WEIGHTS = re.compile(
    rf"(?P<part>{'|'.join(NETWORKS)})/(model|diffusion_pytorch_model)(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors"
    r"(\.index(\.fp16)?\.json)?"  # the list of its shards
)


def fetch(name: str) -> Path:
    """The folder of a model, downloaded first where it is not in the cache.

    Args:
        name: `owner/name`, or `owner/name@revision` with a branch, tag or commit.

    Raises:
        ModelNotFoundError: it is not in the cache and cannot be downloaded, or the Hub's client is not installed; the
            sentence says which.
        CheckpointError: a file in the cache is damaged, or the model has no safetensors.
    """
    try:
        hub, errors = require("huggingface_hub", "hub"), require("huggingface_hub.errors", "hub")
    except MissingExtraError as error:
        # More often a path that was mistyped than an id.
        raise ModelNotFoundError(
            f"There is no folder '{name}'; if it is a Hub id, pip install 'onestill[{error.extra}]'."
        ) from error
    repo, _, revision = name.partition("@")
    folder = _cached(hub, errors, repo, revision or None)
    if folder is None:
        folder = _downloaded(hub, errors, repo, revision or None)
    _check_hashes(folder)
    return folder


def wanted(files: Iterable[str]) -> list[str]:
    """Which of a repository's files a model is drawn with: configs, tokenizers, each network's weights once."""
    found: list[str] = []
    halves: dict[str, list[str]] = {}
    wholes: dict[str, list[str]] = {}
    for file in files:
        if SMALL.fullmatch(file) or re.fullmatch(rf"({'|'.join(NETWORKS)})/config\.json", file):
            found.append(file)
        elif match := WEIGHTS.fullmatch(file):
            (halves if ".fp16" in file else wholes).setdefault(match["part"], []).append(file)
    for part in {*halves, *wholes}:
        found += halves.get(part) or wholes[part]
    return sorted(found)


def _cached(hub: Any, errors: Any, repo: str, revision: str | None) -> Path | None:
    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
        verify(folder)  # another program may have fetched a part of it
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, CheckpointError):
        return None
    return folder


def _downloaded(hub: Any, errors: Any, repo: str, revision: str | None) -> Path:
    try:
        info = hub.HfApi().model_info(repo, revision=revision)
        files = wanted(sibling.rfilename for sibling in info.siblings or ())
        if any(file.endswith(".safetensors") for file in files):
            # By the branch's name, so that the cache remembers which commit it stood at.
            return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=files))
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"The Hub shows you no model '{repo}'; check the name, or log in.") from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"'{repo}' has no revision '{revision}'; leave out what follows '@'.") from error
    except Exception as error:  # of the client, or of whichever HTTP library it uses in this version
        if isinstance(error, AttributeError | TypeError):  # a fault in code, here or there
            raise
        raise ModelNotFoundError(
            f"'{repo}' is neither a local folder nor in the Hub's cache, and the Hub cannot be reached "
            f"({type(error).__name__}); go online, or give a local diffusers folder."
        ) from error
    raise CheckpointError(f"The model '{repo}' has no safetensors in diffusers' format; choose another.")


def _check_hashes(folder: Path) -> None:
    files = {}
    for file in sorted(folder.rglob("*.safetensors")):
        blob = file.resolve().name
        if file.is_symlink() and SHA256.fullmatch(blob):
            files[file.relative_to(folder).as_posix()] = {"sha256": blob}
    if files:
        check_contents(folder, files, use_stamps=True)
