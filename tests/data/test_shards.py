"""Shards: what is written is read back, in a resumable order, and damage costs only the samples it hit."""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestill.data import ReaderState, Sample, ShardReader, ShardWriter, find_shards, sample_shards
from onestill.errors import DataError

SIDE = 8


def picture(number: int) -> bytes:
    pixels = np.full((SIDE, SIDE, 3), number % 256, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return file.getvalue()


def write(folder: Path, count: int = 20, per_shard: int = 7) -> list[Path]:
    with ShardWriter(folder, per_shard) as writer:
        for i in range(count):
            writer.write(f"k{i:03d}", picture(i), f"caption {i}", {"number": i})
    return writer.paths


def keys(samples: list[Sample]) -> list[str]:
    return [sample.key for sample in samples]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_round_trip(tmp_path: Path) -> None:
    paths = write(tmp_path)
    assert [path.name for path in paths] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    reader = ShardReader(tmp_path, shuffle=False, epochs=1)
    samples = list(reader)
    assert len(reader) == 20
    assert keys(samples) == [f"k{i:03d}" for i in range(20)]
    for i, sample in enumerate(samples):
        assert sample.caption == f"caption {i}"
        assert sample.meta == {"number": i}
        assert sample.image.dtype == np.uint8
        assert sample.image.shape == (SIDE, SIDE, 3)
        assert (sample.image == i).all()
    assert reader.skipped == {}


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_processes_read_ahead_to_the_same_samples_states_and_gaps(tmp_path: Path, part: tuple[int, int]) -> None:
    with ShardWriter(tmp_path, 50) as writer:
        for i in range(110):
            writer.write(f"k{i:03d}", b"no picture" if i % 9 == 4 else picture(i), f"caption {i}", {})
    seen = {}
    for workers in (0, 2):
        reader = ShardReader(tmp_path, seed=3, start=ReaderState(0, 17), epochs=2, part=part, workers=workers)
        seen[workers] = [(sample.key, int(sample.image[0, 0, 0]), reader.state) for sample in reader], reader.skipped
        reader.close()
    assert seen[2] == seen[0]
    assert len(seen[0][1]) >= 5


def test_a_killed_process_is_told(tmp_path: Path) -> None:
    write(tmp_path)
    reader = ShardReader(tmp_path, workers=1)
    samples = iter(reader)
    next(samples)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DataError, match=r"lower data\.workers"):
        list(samples)
    reader.close()


def test_equal_samples_give_equal_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    write(tmp_path / "one", per_shard=20)
    write(tmp_path / "many", per_shard=3)
    orders = [keys(list(ShardReader(tmp_path / name, seed=5, epochs=2))) for name in ("one", "many")]
    assert orders[0] == orders[1]
    first, second = orders[0][:20], orders[0][20:]
    assert sorted(first) == sorted(second)
    assert first != second
    assert keys(list(ShardReader(tmp_path / "one", seed=6, epochs=1))) != first


def test_resumes_exactly_anywhere(tmp_path: Path) -> None:
    write(tmp_path)
    reader = ShardReader(tmp_path, seed=3, epochs=3)
    states, order = [reader.state], []
    for sample in reader:
        order.append(sample.key)
        states.append(reader.state)
    assert len(order) == 60
    for done in np.random.Generator(np.random.PCG64(0)).integers(0, 60, 12):
        state = ReaderState.from_dict(json.loads(json.dumps(states[done].as_dict())))
        assert keys(list(ShardReader(tmp_path, seed=3, epochs=3, start=state))) == order[done:]


def test_parts_share_one_order(tmp_path: Path) -> None:
    write(tmp_path)
    whole = keys(list(ShardReader(tmp_path, seed=2, epochs=1)))
    parts = [keys(list(ShardReader(tmp_path, seed=2, epochs=1, part=(i, 3)))) for i in range(3)]
    assert [whole[i::3] for i in range(3)] == parts


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_processes_go_on_at_the_furthest_place_whatever_the_epoch(tmp_path: Path, stop: int) -> None:
    write(tmp_path, count=5, per_shard=2)

    def readers(n: int, start: ReaderState) -> list[ShardReader]:
        return [ShardReader(tmp_path, seed=2, epochs=4, part=(i, n), start=start) for i in range(n)]

    def steps(running: list[Iterator[Sample]], count: int) -> list[str]:
        return [next(samples).key for _ in range(count) for samples in running]

    order = keys(list(ShardReader(tmp_path, seed=2, epochs=4)))
    before = readers(2, ReaderState())
    assert steps([iter(reader) for reader in before], stop) == order[: 2 * stop]
    furthest = max((reader.state for reader in before), key=lambda state: list(state.as_dict().values()))
    assert steps([iter(reader) for reader in readers(2, furthest)], 10 - stop) == order[2 * stop :]
    assert keys(list(ShardReader(tmp_path, seed=2, epochs=4, start=furthest))) == order[2 * stop :]


def test_odd_samples_are_skipped_counted_and_named(tmp_path: Path) -> None:
    good = picture(1)
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, data in (
            ("fine.webp", good),
            ("fine.txt", b"words"),
            ("nocaption.webp", good),
            ("empty.webp", good),
            ("empty.txt", b" \n"),
            ("noimage.txt", b"words"),
            ("cut.webp", good[: len(good) // 2]),
            ("cut.txt", b"words"),
            ("noise.png", bytes(range(200))),
            ("noise.txt", b"words"),
            ("json.webp", good),
            ("json.txt", b"words"),
            ("json.json", b"{"),
            ("list.webp", good),
            ("list.txt", b"words"),
            ("list.json", b"[]"),
            ("latin.webp", good),
            ("latin.txt", b"caf\xe9"),
            ("deep.webp", good),
            ("deep.txt", b"words"),
            ("deep.json", b"[" * 100_000),
            ("header.webp", good),
            ("header.txt", b"words"),
            ("header.latents.npy", b"\x93NUMPY\1\0v\0" + b"{'shape': (2,".ljust(118)),
            ("zip.webp", good),
            ("zip.txt", b"words"),
            ("zip.latents.npy", b"PK\3\4" + bytes(100)),
        ):
            add(tar, name, data)
    reader = ShardReader(tmp_path, epochs=1)
    assert keys(list(reader)) == ["fine"]
    bad = "cut deep empty header json latin list nocaption noimage noise zip"
    assert sorted(reader.skipped) == [f"odd.tar:{name}" for name in bad.split()]
    assert reader.skipped["odd.tar:nocaption"] == "it has no caption"
    assert reader.skipped["odd.tar:noimage"] == "it has no image"
    assert reader.skipped["odd.tar:noise"] == "its image is of no known kind"


def test_a_size_leaves_other_sizes_out(tmp_path: Path) -> None:
    big = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE + 1)).save(big, "PNG")
    with ShardWriter(tmp_path) as writer:
        writer.write("a", picture(0), "small", {})
        writer.write("b", big.getvalue(), "big", {}, suffix="png")
    reader = ShardReader(tmp_path, shuffle=False, epochs=1, size=(SIDE, SIDE))
    assert keys(list(reader)) == ["a"]
    assert reader.skipped == {"shard-000000.tar:b": "it is 9 x 8 pixels, not 8 x 8"}


def test_a_truncated_shard_gives_what_is_whole(tmp_path: Path) -> None:
    (path,) = write(tmp_path, count=5, per_shard=5)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        cut = tar.getmember("k003.webp").offset_data + 10
    path.write_bytes(data[:cut])
    reader = ShardReader(tmp_path, shuffle=False, epochs=1)
    assert keys(list(reader)) == ["k000", "k001", "k002"]
    assert reader.skipped == {"shard-000000.tar:k003.webp": "the shard ends in the middle of it"}


def test_a_damaged_header_costs_one_sample(tmp_path: Path) -> None:
    (path,) = write(tmp_path, count=5, per_shard=5)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember("k002.webp").offset
    data[start : start + 300] = bytes(reversed(range(256))) + bytes(44)
    path.write_bytes(data)
    reader = ShardReader(tmp_path, shuffle=False, epochs=1)
    assert keys(list(reader)) == ["k000", "k001", "k003", "k004"]
    assert set(reader.skipped) == {f"shard-000000.tar:byte {start}", "shard-000000.tar:k002"}


def test_a_size_below_nothing_is_damage(tmp_path: Path) -> None:
    (path,) = write(tmp_path, count=3, per_shard=3)
    data = bytearray(path.read_bytes())
    data[124:136] = b"-0000001000\0"  # a place before the header, to which reading would go back for ever
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    reader = ShardReader(tmp_path, shuffle=False, epochs=1)
    assert keys(list(reader)) == ["k001", "k002"]
    assert reader.skipped["shard-000000.tar:byte 0"] == "no tar header where one should be"


def test_sixteen_bits_of_grey_keep_their_grey(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE), 100 << 8, np.uint16)).save(file, "PNG")
    with ShardWriter(tmp_path) as writer:
        writer.write("grey", file.getvalue(), "grey", {}, suffix="png")
    (sample,) = ShardReader(tmp_path, epochs=1)
    assert (sample.image == 100).all()


def test_a_missing_or_empty_shard_among_good_ones(tmp_path: Path) -> None:
    write(tmp_path, count=3)
    (tmp_path / "void.tar").write_bytes(b"")
    reader = ShardReader(tmp_path, epochs=1)
    assert len(list(reader)) == 3
    assert reader.skipped == {"void.tar:byte 0": "the shard is empty"}


def test_tars_of_other_tools_are_read(tmp_path: Path) -> None:
    long = "folder/" + "x" * 120
    for name, kind in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=kind) as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            add(tar, f"{long}.webp", picture(7))
            add(tar, f"{long}.txt", "ein Café".encode())
    samples = list(ShardReader(tmp_path, shuffle=False, epochs=1))
    assert keys(samples) == [long, long]
    assert [sample.caption for sample in samples] == ["ein Café"] * 2


def test_tars_of_other_tools_are_kept(tmp_path: Path) -> None:
    names = ["./00002", "./a.b/00002", "a-b/00002", "a-b-00002", "ö" * 90, "ö" * 91, "x" * 88]
    for shard in ("one", "two"):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for name in names:
                add(tar, f"{name}.webp", picture(7))
                add(tar, f"{name}.txt", f"{shard} {name}".encode())
    reader = ShardReader(tmp_path, shuffle=False, epochs=1)
    with ShardWriter(tmp_path / "kept", 11) as writer:
        for sample in reader:
            writer.keep(sample, {"latents": np.zeros((4, 2, 2), np.float16)})
    kept = list(ShardReader(tmp_path / "kept", shuffle=False, epochs=1))
    assert [sample.caption for sample in kept] == [f"{shard} {name}" for shard in ("one", "two") for name in names]
    assert all("latents" in sample.arrays for sample in kept)
    found = keys(kept)
    assert found[:4] == ["00002", "a-b-00002", "0000002-a-b-00002", "0000003-a-b-00002"]
    assert found[6:8] == ["x" * 88, "0000007-00002"]
    assert found[11:] == ["ö" * 44, "0000001-" + "ö" * 40, "x" * 88]


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(file, "PNG")
    with ShardWriter(tmp_path) as writer:
        writer.write("clear", file.getvalue(), "nothing", {}, suffix="png")
    (sample,) = ShardReader(tmp_path, epochs=1)
    assert (sample.image == 255).all()


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no shard or folder"):
        find_shards(tmp_path / "none")
    with pytest.raises(DataError, match="No shards"):
        ShardReader(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(DataError, match="No samples"):
        ShardReader(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.webp", picture(0))
    with pytest.raises(DataError, match="Not one of 1 samples can be used"):
        next(iter(ShardReader(tmp_path)))


def write_then_fail(folder: Path) -> None:
    with ShardWriter(folder) as writer:
        writer.write("a", picture(0), "words", {})
        writer.write("b", picture(0), "words", {"number": object()})


def test_a_failed_write_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON"):
        write_then_fail(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="dot or a slash"):
        ShardWriter(tmp_path).write("a.b", b"", "", {})


def test_the_sample_set_opens() -> None:
    (path,) = sample_shards()
    assert path.stat().st_size < 1.5e6
    reader = ShardReader(sample_shards(), seed=0, epochs=1)
    samples = list(reader)
    assert len(samples) >= 200
    assert reader.skipped == {}
    for sample in samples:
        assert sample.image.shape == (128, 128, 3)
        assert sample.caption
        assert set(sample.meta["licence"].split(" + ")) <= {"MIT", "Apache-2.0"}
        assert sample.meta["author"]
        assert sample.meta["split"] == "train"
    assert len({sample.meta["id"] for sample in samples}) == len(samples)


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def read_pairs(path: Path) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """(caption, grey) of every sample, and what was skipped."""
    reader = ShardReader(path, shuffle=False, epochs=1)
    return [(sample.caption, int(sample.image[0, 0, 0])) for sample in reader], reader.skipped


def test_a_key_that_is_there_twice_is_two_samples(tmp_path: Path) -> None:
    first, second = ("0.webp", picture(10)), ("0.webp", picture(200))
    after = (("1.webp", picture(90)), ("1.txt", b"after"))
    samples = (first, ("0.txt", b"first"), second, ("0.txt", b"second"))
    assert read_pairs(tar_of(tmp_path / "a.tar", *samples, *after)) == (
        [("first", 10), ("second", 200), ("after", 90)], {},
    )  # fmt: skip
    assert read_pairs(tar_of(tmp_path / "b.tar", *samples[:2], *after, *samples[2:]))[0] == [
        ("first", 10), ("after", 90), ("second", 200),
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["iic", "icci", "iicc", "cic", "iiicc"])
def test_no_picture_gets_the_caption_of_another(tmp_path: Path, order: str) -> None:
    """i is a picture and c a caption of one key; each stands for a sample whose other half may be lost."""
    made = [("0.webp", picture(i)) if kind == "i" else ("0.txt", b"c") for i, kind in enumerate(order)]
    after = (("1.webp", picture(90)), ("1.txt", b"after"))
    samples, skipped = read_pairs(tar_of(tmp_path / "odd.tar", *made, *after))
    if order == "icci":  # each has both halves
        assert samples == [("c", 0), ("c", 3), ("after", 90)]
    else:
        assert samples == [("after", 90)]
        assert "its key is there" in skipped["odd.tar:0"]


def test_two_pictures_under_one_caption_are_named(tmp_path: Path) -> None:
    made = (("0.webp", picture(1)), ("0.png", picture(2)), ("0.txt", b"which"))
    samples, skipped = read_pairs(tar_of(tmp_path / "odd.tar", *made, ("1.webp", picture(3)), ("1.txt", b"one")))
    assert samples == [("one", 3)]
    assert skipped == {"odd.tar:0": "it has several images (webp, png)"}


def test_pictures_are_turned_as_cameras_say(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.vstack([np.zeros((4, 16, 3), np.uint8), np.full((4, 16, 3), 255, np.uint8)])).save(
        file, "JPEG", exif=exif, quality=95
    )
    path = tar_of(tmp_path / "turned.tar", ("0.jpg", file.getvalue()), ("0.txt", b"half and half"))
    (sample,) = ShardReader(path, epochs=1)
    assert sample.image.shape == (16, 8, 3)
    assert sample.image[:, :3].min() > 200  # what was below is at the left
    assert sample.image[:, 5:].max() < 50


def test_marks_of_encodings_are_no_part_of_captions(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    made = (("0.webp", picture(1)), ("0.txt", mark + b"a cat"), ("0.json", mark + b'{"a": 1}'))
    others = (("1.webp", picture(2)), ("1.txt", "a cat".encode("utf-16")))
    reader = ShardReader(tar_of(tmp_path / "marked.tar", *made, *others), shuffle=False, epochs=1)
    (sample,) = reader
    assert (sample.caption, sample.meta) == ("a cat", {"a": 1})
    assert reader.skipped == {"marked.tar:1": "its caption is not in UTF-8"}


def test_a_compressed_shard_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "0.webp", picture(1))
    with pytest.raises(DataError, match="compressed: unpack it"):
        ShardReader(tmp_path / "packed.tar")
