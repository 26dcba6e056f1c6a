"""Where pictures go: names made from prompts, and refusals before any work is done."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from onestill.errors import OutputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_PICTURES = (".avif", ".bmp", ".gif", ".heic", ".jxl", ".pdf", ".svg", ".tif", ".tiff")
SLUG_BYTES = 100  # leaves room for the seed and a number within the 255 bytes a file name may have


def slug(prompt: str) -> str:
    """The letters and digits of `prompt`, lower case, joined by hyphens: `a-red-apple`. At most 100 bytes."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    words = "".join(letter if letter.isalnum() else " " for letter in text).split()
    return "-".join(words).encode()[:SLUG_BYTES].decode(errors="ignore").strip("-") or "picture"


def free_path(folder: Path, stem: str, taken: Iterable[Path] = ()) -> Path:
    """`folder/stem.png`, or the first of `stem-2.png`, `stem-3.png`, ... that neither exists nor is `taken`."""
    taken = set(taken)
    path, number = folder / f"{stem}.png", 1
    while path in taken or os.path.lexists(path):
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path


def is_file_name(out: Path) -> bool:
    """Whether `--out` names one picture rather than a folder for several."""
    return out.suffix.lower() in SUFFIXES and not out.is_dir()


class Target:
    """Where the pictures of one command go.

    Args:
        out: a file (`.png`, `.jpg`, `.webp`) for one picture, or a folder; None for the working folder.
        count: how many pictures there will be.
        force: whether a file of the same name may be replaced.

    Raises:
        OutputError: the place cannot be written, a file is in the way, or one file was named for several pictures.
            Checked here, before a model is loaded; nothing is created.
    """

    def __init__(self, out: Path | None, count: int, force: bool) -> None:
        self.force = force
        self.file = out if out is not None and is_file_name(out) else None
        self.folder = self.file.parent if self.file is not None else out if out is not None else Path()
        self.taken: list[Path] = []
        if self.file is not None:
            if count > 1:
                raise OutputError(
                    f"'{out}' names one file for {count} pictures; give a folder, such as --out pictures."
                )
            if os.path.lexists(self.file) and not force:
                raise OutputError(f"'{out}' exists; give another name, or --force to replace it.")
        elif self.folder.suffix.lower() in OTHER_PICTURES and not self.folder.is_dir():
            raise OutputError(
                f"'{out}' is of a kind that is not written; end it in .png, .jpg or .webp, or give a folder."
            )
        check_writable(self.folder)

    def path(self, prompt: str, seed: int) -> Path:
        """The path for the next picture. Its folder is made when it is not there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"The folder '{self.folder}' cannot be made ({error.strerror}); give another --out."
            ) from error
        if self.file is not None:
            return self.file
        stem = f"{slug(prompt)}-{seed}"
        named = self.folder / f"{stem}.png"
        path = named if self.force and named not in self.taken else free_path(self.folder, stem, self.taken)
        self.taken.append(path)
        return path


def check_writable(folder: Path) -> None:
    """Raise `OutputError` unless files can be made in `folder`, or `folder` itself can be made."""
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(f"'{nearest}' is not a folder, so nothing can be written in it; give another --out.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"The folder '{nearest}' may not be written to; give another --out.")
