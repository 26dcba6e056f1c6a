from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestill.data import ShardWriter
from recipes.icons.evaluate import Pool, main
from tests.evaluate.shapes import NAMES, shape
from tests.evaluate.test_networks import contrastive

STYLES = ("solid", "outline", "twemoji")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("val", "style", "concept"):
        with ShardWriter(folder / split, 10) as writer:
            for i in range(16):
                file = io.BytesIO()
                Image.fromarray(shape(NAMES[i % 8], at=(0.4 + 0.02 * (i % 5), 0.5))).save(file, "WEBP", lossless=True)
                # The last two repeat an icon and a caption.
                icon, caption = min(i, 14), f"a {NAMES[i % 8]} {split} {i if i != 14 else 0}, {STYLES[i % 3]} icon"
                meta = {"id": f"{split}:{icon}", "style": STYLES[i % 3], "split": split}
                writer.write(f"{split}-{i:03d}", file.getvalue(), caption, meta)
    return folder


def test_the_pool_gives_each_icon_and_caption_once(data: Path) -> None:
    pool = Pool(data, seed=0)
    first, second = pool.take(21), pool.take(12)
    assert [sum(sample.split == split for sample in first) for split in ("val", "style", "concept")] == [7, 7, 7]
    together = [*first, *second]
    assert len({sample.icon for sample in together}) == len({sample.caption for sample in together}) == 33
    again = Pool(data, seed=0).take(21)
    assert again == first
    assert Pool(data, seed=1).take(21) != first
    pictures = np.concatenate(list(pool.pictures(first, batch_size=8)))
    assert pictures.shape == (21, 32, 32, 3)


def test_the_report_is_made_and_made_again_from_what_was_kept(
    data: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = contrastive(tmp_path / "evaluation")
    arguments = ["--data", str(data), "--teacher", str(tiny_folder), "--student", str(tiny_folder)]
    arguments += ["--network", str(network), "--also", str(contrastive(tmp_path / "discriminator", "resnet"))]
    arguments += ["--out", str(tmp_path / "report"), "--work", str(tmp_path / "work"), "--captions", "12"]
    arguments += ["--sweep-captions", "6", "--sweep-steps", "2", "--guidance", "1", "2"]
    arguments += ["--teacher-steps", "1", "2", "--student-steps", "1", "--engine", "torch", "--threads", "1"]
    main(arguments)
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "index.html")
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    names = [result["name"] for result in facts["results"]]
    assert names == ["teacher, 1 step", "teacher, 2 steps", "student, 1 step"]
    assert facts["num_prompts"] == 12
    assert [target["limit"] for target in facts["targets"]] == [
        "at most 1.25x",
        "at most 5 % lower",
        "at least 2x",
        "at least 80 %",
    ]
    assert str(tmp_path) not in (tmp_path / "report" / "report.json").read_text()
    kept = sorted((tmp_path / "work").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 3 + 2
    main(arguments)
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_too_few_captions_are_one_sentence(
    data: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(data), "--teacher", str(tiny_folder), "--student", str(tiny_folder)]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--network", str(contrastive(tmp_path / "n")), "--work", str(tmp_path / "work")])
    assert stopped.value.code == 2
    assert "ask for fewer" in capsys.readouterr().err
