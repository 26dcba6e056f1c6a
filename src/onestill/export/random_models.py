"""Models of random weights at real size, made once and kept in the cache folder: what speed is measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onestill.checkpoint import Additions, cache_folder, describe
from onestill.errors import OnestillError, near, require

RANDOM_MODELS = ("sdxl", "sd21")

Say = Callable[[str], object]


def cached_random_model(kind: str, say: Say) -> Path:
    """The folder of a random model in diffusers' format, with a tiny decoder in its folder `tiny_vae`.

    Args:
        kind: one of `RANDOM_MODELS`.
        say: is given a sentence before a model is made, which takes minutes.

    Raises:
        OnestillError: there is no such kind.
        MissingExtraError: torch or diffusers is not installed.
    """
    if kind not in RANDOM_MODELS:
        raise OnestillError(
            f"There is no random model '{kind}'; choose from {', '.join(RANDOM_MODELS)}.{near(kind, RANDOM_MODELS)}"
        )
    require("diffusers", "torch")
    from onestill.networks.random_weights import random_model

    return _made_once(cache_folder() / "random" / kind, lambda path: random_model(kind, path), say)


def cached_random_openvino(kind: str, tiny_vae: str | None, weights: str, say: Say) -> Path:
    """The same model in OpenVINO's form, with `weights` in "float16" or "int8" and, if given, a tiny decoder."""
    from onestill.export.stored_weights import export_sd

    info = describe(cached_random_model(kind, say), Additions.of(tiny_vae=tiny_vae))
    folder = cache_folder() / "random" / f"{kind}-openvino-{weights}{'-tiny' if tiny_vae else ''}"
    return _made_once(folder, lambda path: export_sd(info, path, weights=weights), say)


def _made_once(folder: Path, make: Callable[[Path], Path], say: Say) -> Path:
    if not folder.is_dir():
        from onestill.export.folder import folder_written_whole

        say(f"making {folder}, once")
        with folder_written_whole(folder, force=False) as unfinished:
            make(unfinished)
    return folder
