"""Fetch the packages that icons.parquet is built from, with the ordinary clients, or take a built table.

    python -m recipes.icons.fetch --out sources                          # npm pack, apt-get and pip download, unpack
    python -m recipes.icons.fetch --out sources --parquet icons.parquet  # copy a table that is already built

Every archive is checked against its SHA-256 before it is unpacked. What is already there is not fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from onestill.errors import DataError
from recipes.icons.packages import PACKAGES, PARQUET_SHA256, Package


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, expected: str) -> None:
    """Raise DataError unless the file has the expected SHA-256."""
    found = sha256_of(path)
    if found != expected:
        raise DataError(
            f"{path} has the SHA-256 {found[:12]}..., not {expected[:12]}...: "
            "it is another version or damaged, fetch it again."
        )


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not installed: install it, or give a built table with --parquet.") from None
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise DataError(f"`{' '.join(command)}` failed ({lines[-1]}): see whether the registry can be reached.")


def _download(package: Package, folder: Path) -> Path:
    """Download a package's archive into an empty folder."""
    if package.client == "npm":
        _run(("npm", "pack", "--silent", package.request), folder)
    elif package.client == "pip":
        # Told the hash, pip checks it before it runs anything of a source archive.
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{package.request} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        _run((sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-r", wanted.name), folder)
        wanted.unlink()
    else:
        # apt writes as its own user when it may; the folder is private to this one.
        _run(("apt-get", "download", "-o", "APT::Sandbox::User=root", package.request), folder)
    archives = [path for path in folder.iterdir() if path.suffix in (".tgz", ".deb", ".gz", ".whl")]
    if len(archives) != 1:
        raise DataError(f"{package.client} left {len(archives)} archives for {package.request}: fetch it again.")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".deb":
        _run(("dpkg", "-x", str(archive), str(folder)), archive.parent)
        return
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        return
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    inner = next(folder.iterdir())
    for path in list(inner.iterdir()):
        path.rename(folder / path.name)
    inner.rmdir()


def fetch(package: Package, out: Path) -> Path:
    """Fetch, check and unpack one package into `out`; returns its folder, which appears only when it is complete."""
    target = out / package.folder
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetch-") as work:
        (Path(work) / "archive").mkdir()
        (Path(work) / "files").mkdir()
        archive = _download(package, Path(work) / "archive")
        check(archive, package.sha256)
        _unpack(archive, Path(work) / "files")
        os.replace(Path(work) / "files", target)
    return target


def take_parquet(source: Path, out: Path) -> Path:
    """Copy an already built table to `out`/icons.parquet after checking its SHA-256."""
    if not source.is_file():
        raise DataError(
            f"There is no file {source}: give the built table with --parquet, or leave the option out to fetch."
        )
    check(source, PARQUET_SHA256)
    partial = out / ".icons.parquet.partial"
    shutil.copyfile(source, partial)
    return partial.replace(out / "icons.parquet")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="the folder for the packages or the table")
    parser.add_argument("--parquet", type=Path, help="an already built table to take instead of fetching")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        if options.parquet is not None:
            print(take_parquet(options.parquet, options.out))
            return
        for package in PACKAGES:
            print(fetch(package, options.out), flush=True)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
