from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from recipes.icons import common


def shard(path: Path, facts: dict[str, dict[str, str]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, fact in facts.items():
            for name, content in ((f"{key}.json", json.dumps(fact)), (f"{key}.latents.npy", f"array of {key}")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content.encode()))
    return path


def names(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += tar.getnames()
    return found


def test_common_things_and_shapes_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    apple = {f"apple{i}": {"concept": "apple", "style": style} for i, style in enumerate(("3d", "flat", "3d"))}
    rare = {f"rare{i}": {"concept": f"rare {i}", "style": "3d"} for i in range(40)}
    shard(tmp_path / "in/a.tar", apple | rare)
    shape = {"shape": {"concept": "circle", "style": "flat", "set": "shapes"}}
    shard(tmp_path / "in/b.tar", {"both": {"concept": "apple", "style": "3d + flat"}} | shape)
    monkeypatch.setattr(common, "SAMPLES_PER_SHARD", 2)
    for others, kept in ((0.0, 4), (1.0, 45)):
        out = tmp_path / f"out{others}"
        arguments = ["--shards", str(tmp_path / "in"), "--out", str(out), "--things", "1", "--others", str(others)]
        common.main([*arguments, "--done", str(tmp_path / "done")])
        assert len(names(out)) == 2 * kept
        assert {"apple0.json", "apple1.latents.npy", "apple2.json", "shape.json"} <= set(names(out))
        assert ("both.json" in names(out)) == (others == 1.0)
        assert len(list(out.glob("*.tar"))) == -(-kept // 2)
    assert (tmp_path / "done").exists()
    with tarfile.open(tmp_path / "out0.0/shard-000000.tar") as tar:
        assert tar.extractfile("apple0.latents.npy").read() == b"array of apple0"  # type: ignore[union-attr]
