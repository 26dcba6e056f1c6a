"""Image-text data as WebDataset shards: plain tar files holding KEY.webp (or png, jpg), KEY.txt and KEY.json.

A cache of what networks make of a sample adds arrays: KEY.latents.npy, KEY.text.npy, ...

`ShardWriter` writes them; `ShardReader` reads them in an order that a seed names and that can be resumed anywhere.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import read_array

from onestill.data.ahead import Ahead
from onestill.data.picture import DAMAGE, decode_image
from onestill.data.tarindex import IMAGE_SUFFIXES, Entry, plain_key, read_index
from onestill.errors import DataError

_OPEN_FILES = 64


@dataclass(frozen=True)
class Sample:
    """One picture with its caption: `image` is uint8 [H, W, 3], transparent parts on white (0 pixels if not asked for).

    `arrays` holds the sample's .npy files by name; `encoded` is the picture's file, of the kind that `suffix` says.
    """

    key: str
    image: npt.NDArray[np.uint8]
    caption: str
    meta: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    encoded: bytes = b""
    suffix: str = ""


@dataclass(frozen=True)
class ReaderState:
    """Where a reader stands: `position` places of the order of `epoch` are behind it, damaged samples included."""

    epoch: int = 0
    position: int = 0

    def as_dict(self) -> dict[str, int]:
        """The state as what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, int]) -> ReaderState:
        """The state that `as_dict` gave."""
        return cls(int(values["epoch"]), int(values["position"]))


def find_shards(source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The shards that are meant by a folder (all its .tar files, by name), a file, or a list of either.

    The text `sample` means the package's own set; a folder of that name is `./sample`.

    Raises:
        DataError: there are none, or one does not exist.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    found: list[Path] = []
    for source in sources:
        one = Path(source)
        if source == "sample":
            found += sample_shards()
        elif one.is_dir():
            found += sorted(path for path in one.glob("*.tar") if not path.name.startswith("."))
        elif one.is_file():
            found.append(one)
        else:
            raise DataError(f"There is no shard or folder {one}: give a .tar file or a folder of them.")
    if not found:
        raise DataError(
            f"No shards in {', '.join(map(str, sources)) or 'an empty list'}: give .tar files or a folder of them."
        )
    return found


class ShardReader:
    """Iterates over the samples of local shards, epoch after epoch.

    The order is a permutation of all samples that depends on (`seed`, epoch) alone, or the order of the files when
    `shuffle` is off; `start` resumes it exactly. `epochs` ends the iteration after that many (None: never). With
    `part=(i, n)` the reader takes every n-th place from i on, counted through all epochs, so that n processes share one
    order. With `size` (height, width), samples of another size are left out.
    `images=False` leaves the pictures undecoded, for training from cached arrays. `workers` processes
    read ahead, in the same order; with 0 the caller's thread reads.

    A sample without a readable image and caption is left out, and `skipped` names it ("SHARD:KEY") with the reason.
    Raises DataError if there are no shards or not one sample in them can be read.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        seed: int = 0,
        shuffle: bool = True,
        start: ReaderState | None = None,
        epochs: int | None = None,
        part: tuple[int, int] = (0, 1),
        size: tuple[int, int] | None = None,
        images: bool = True,
        workers: int = 0,
    ):
        if part[1] < 1 or not 0 <= part[0] < part[1]:
            raise ValueError(f"part must be (i, n) with 0 <= i < n, not {part}")
        self.paths = find_shards(source)
        self.seed = seed
        self.shuffle = shuffle
        self.epochs = epochs
        self.state = start or ReaderState()
        self.skipped: dict[str, str] = {}
        self._part = part
        self._size = size
        self._images = images
        self._workers = workers
        self._ahead: Ahead[tuple[list[Sample | None], dict[str, str]]] | None = None
        self._files: OrderedDict[int, int] = OrderedDict()
        self._entries: list[tuple[int, Entry]] = []
        for number, path in enumerate(self.paths):
            try:
                index = read_index(path)
            except OSError as error:
                self.skipped[path.name] = f"the shard cannot be read ({error.strerror or error})"
                continue
            for what, why in index.damage:
                self.skipped[f"{path.name}:{what}"] = why
            self._entries += [(number, entry) for entry in index.entries]
        if not self._entries:
            why = next((f" ({what}: {why})" for what, why in self.skipped.items()), "")
            shards = f"{len(self.paths)} shard(s), the first of which is {self.paths[0]}"
            raise DataError(f"No samples in {shards}{why}: make them again.")

    def __len__(self) -> int:
        """How many samples the shards hold, the damaged ones among them included."""
        return len(self._entries)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The sample numbers in the order of an epoch, int64 [N]."""
        if not self.shuffle:
            return np.arange(len(self), dtype=np.int64)
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self))

    def read(self, number: int) -> Sample | None:
        """Sample `number` in the order of the files, or None (and an entry in `skipped`) if it cannot be used."""
        shard, entry = self._entries[number]
        try:
            return self._decode(shard, entry)
        except DAMAGE as error:
            self.skipped[f"{self.paths[shard].name}:{entry.key}"] = str(error) or type(error).__name__
            return None

    def __iter__(self) -> Iterator[Sample]:
        """Samples from `state` on. After each, `state` is where to resume behind it."""
        while self.epochs is None or self.state.epoch < self.epochs:
            epoch, given = self.state.epoch, 0
            whole = self.state.position == 0
            order = self.order(epoch)
            # Places are dealt in one endless round: dealt anew each epoch, processes would drift apart.
            before, (i, n) = epoch * len(order), self._part
            mine = [place for place in range(self.state.position, len(order)) if (before + place) % n == i]
            for position, sample in zip(mine, self._read_all(order[mine].tolist()), strict=True):
                if sample is not None:
                    given += 1
                    self.state = ReaderState(epoch, position + 1)
                    yield sample
            if whole and not given:
                name, why = next(iter(self.skipped.items()), (str(self.paths[0]), "this part of the samples is empty"))
                raise DataError(
                    f"Not one of {len(order)} samples can be used (the first: {name}: {why}): make the shards again."
                )
            self.state = ReaderState(epoch + 1, 0)

    def _read_all(self, numbers: list[int]) -> Iterator[Sample | None]:
        if not self._workers:
            yield from map(self.read, numbers)
            return
        self._ahead = self._ahead or Ahead(self._read_some, self._workers)
        for samples, skipped in self._ahead(numbers):
            self.skipped |= skipped
            yield from samples

    def _read_some(self, numbers: Sequence[int]) -> tuple[list[Sample | None], dict[str, str]]:
        self.skipped = {}
        return [self.read(number) for number in numbers], self.skipped

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict(), "_ahead": None, "skipped": {}}

    def close(self) -> None:
        """Close the shard files and end what reads ahead."""
        if self._ahead:
            self._ahead.close()
            self._ahead = None
        while self._files:
            os.close(self._files.popitem()[1])

    def _bytes(self, shard: int, place: tuple[int, int]) -> bytes:
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            descriptor = os.open(self.paths[shard], os.O_RDONLY)
        self._files[shard] = descriptor
        offset, size = place
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise ValueError("the shard ends in the middle of it")
        return data

    def _decode(self, shard: int, entry: Entry) -> Sample:
        if entry.unclear:
            raise ValueError(entry.unclear)
        if not entry.images:
            raise ValueError("it has no image")
        if len(entry.images) > 1:
            raise ValueError(f"it has several images ({', '.join(entry.images)})")
        if "txt" not in entry.files:
            raise ValueError("it has no caption")
        caption = _text(self._bytes(shard, entry.files["txt"]))
        if not caption:
            raise ValueError("its caption is empty")
        meta = json.loads(self._bytes(shard, entry.files["json"])) if "json" in entry.files else {}
        if not isinstance(meta, dict):
            raise ValueError("its JSON is not an object")
        arrays = {
            name.removesuffix(".npy"): read_array(io.BytesIO(self._bytes(shard, place)), allow_pickle=False)
            for name, place in entry.files.items()
            if name.endswith(".npy")
        }
        if not self._images:
            return Sample(entry.key, np.zeros((0, 0, 3), np.uint8), caption, meta, arrays)
        (suffix,) = entry.images
        encoded = self._bytes(shard, entry.files[suffix])
        image = decode_image(encoded)
        if self._size is not None and image.shape[:2] != self._size:
            raise ValueError(f"it is {image.shape[0]} x {image.shape[1]} pixels, not {self._size[0]} x {self._size[1]}")
        return Sample(entry.key, image, caption, meta, arrays, encoded, suffix)


def _text(data: bytes) -> str:
    """A caption, with the mark of its encoding that Windows writes or without."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError("its caption is not in UTF-8") from error


def sample_shards() -> list[Path]:
    """The shards of the package's sample set: a few hundred captioned MIT and Apache-2.0 icons, 128 x 128 pixels."""
    return sorted((Path(__file__).parent / "sample").glob("*.tar"))


def _npy(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _member(name: str, data: bytes) -> tarfile.TarInfo:
    """A tar header without times or owners, so that equal samples give equal files."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    return info


class ShardWriter:
    """Writes samples into `folder/PREFIX-000000.tar`, `PREFIX-000001.tar`, ... of `samples_per_shard` samples each.

    A shard appears under its name only when it is complete. `first` numbers the first shard, so that several processes
    can write into one folder. Use it as a context manager: leaving it by an error drops the unfinished shard.
    """

    def __init__(
        self, folder: str | os.PathLike[str], samples_per_shard: int = 1000, *, prefix: str = "shard", first: int = 0
    ):
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.paths: list[Path] = []
        self._prefix = prefix
        self._number = first
        self._count = 0
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None
        self._partial = Path()
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(
        self,
        key: str,
        image: bytes,
        caption: str,
        meta: Mapping[str, Any],
        *,
        suffix: str = "webp",
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        """Add a sample: the `image` encoded as `suffix` says, its caption, JSON-able `meta`, arrays by name.

        Keys must be unique and without dots and slashes, which end the key or make folders in WebDataset.
        """
        if suffix not in IMAGE_SUFFIXES:
            raise ValueError(f"unknown image suffix {suffix!r}: use one of {', '.join(IMAGE_SUFFIXES)}")
        if "." in key or "/" in key or not key:
            raise ValueError(f"the key {key!r} is empty or holds a dot or a slash")
        tar = self._tar if self._tar is not None else self._open()
        text = json.dumps(dict(meta), ensure_ascii=False, sort_keys=True)
        stored = [(f"{name}.npy", _npy(array)) for name, array in (arrays or {}).items()]
        for ending, data in ((suffix, image), ("txt", caption.encode()), ("json", text.encode()), *stored):
            tar.addfile(_member(f"{key}.{ending}", data), io.BytesIO(data))
        self._keys.add(key)
        self._count += 1
        if self._count == self.samples_per_shard:
            self._finish()

    def keep(self, sample: Sample, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add a sample that was read with its picture, byte for byte, with these arrays.

        Its key is made plain, and numbered if this shard holds it already, as shards that are read may repeat keys.
        """
        key = plain_key(sample.key)
        if self._count and key in self._keys:
            key = plain_key(f"{self._count:07d}-{key}")
        self.write(key, sample.encoded, sample.caption, sample.meta, suffix=sample.suffix, arrays=arrays)

    def close(self) -> None:
        """Finish the last shard."""
        if self._tar is not None:
            self._finish()

    def discard(self) -> None:
        """Drop the unfinished shard; the finished ones stay."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            self._count = 0
            self._partial.unlink(missing_ok=True)

    def _open(self) -> tarfile.TarFile:
        self._partial = self.folder / f".{self._prefix}-{self._number:06d}.tar.{os.getpid()}"
        self._keys = set()
        # Closed by _finish.
        self._tar = tarfile.open(self._partial, "w", format=tarfile.USTAR_FORMAT, encoding="utf-8")  # noqa: SIM115
        return self._tar

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        path = self.folder / f"{self._prefix}-{self._number:06d}.tar"
        os.replace(self._partial, path)
        self.paths.append(path)
        self._number += 1
        self._count = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
