from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

from onestill.cli import main
from onestill.cli.commands import evaluate
from onestill.data import ShardWriter
from tests.evaluate.shapes import NAMES, shape
from tests.evaluate.test_networks import contrastive

Refused = Callable[..., str]


@pytest.fixture
def asked(here: Path, tiny_folder: Path) -> list[str]:
    """The command, less its models: a reference of eight pictures, a network and a place."""
    with ShardWriter(here / "shards") as writer:
        for i, name in enumerate(NAMES[:8]):
            file = io.BytesIO()
            Image.fromarray(shape(name)).save(file, "PNG")
            writer.write(f"{i}", file.getvalue(), f"a {name} square {i}", {}, suffix="png")
    contrastive(here / "network")
    command = ["evaluate", "--reference", "shards", "--network", "network", "--text-model", str(tiny_folder)]
    return [*command, "--out", "out", "--engine", "torch", "--steps", "1"]


def exported(tiny_folder: Path, folder: Path) -> Path:
    """A run's export: a model without a manifest."""
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("onestill.json", "openvino"))
    return folder


def figures() -> dict[str, float]:
    return {
        one["name"]: one["frechet_distance"]["value"]
        for one in json.loads(Path("out/report.json").read_text())["results"]
    }


def test_a_model_trained_on_is_drawn_again(asked: list[str], tiny_folder: Path) -> None:
    model = exported(tiny_folder, Path("run/export"))
    assert main([*asked, "-m", str(model)]) == 0
    first, material = figures(), Path("out/material/export-1-step.safetensors")
    drawn = material.stat().st_mtime_ns
    assert main([*asked, "-m", str(model)]) == 0
    assert (figures(), material.stat().st_mtime_ns) == (first, drawn)
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    unet.conv_out.weight.data *= 0.1
    unet.save_pretrained(model / "unet")
    assert main([*asked, "-m", str(model)]) == 0
    assert figures() != first


def test_two_runs_go_by_their_folders_and_the_bar_ends_at_its_end(
    asked: list[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals, advanced = [], []

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield advanced.append

    monkeypatch.setattr(evaluate, "progress", progress)
    for run in ("a", "b"):
        asked += ["-m", str(exported(tiny_folder, Path(f"runs/{run}/export")))]
    assert main([*asked, "-m", str(tiny_folder)]) == 0
    assert list(figures()) == ["runs/a/export, 1 step", "runs/b/export, 1 step", "tiny, 1 step"]
    assert [sum(advanced)] == totals


def test_one_model_twice_is_refused(
    refused: Refused, asked: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_folder)
    capsys.readouterr()  # transformers' bars of the network's making
    assert f"unlike '{folder}, 1 step' and '{folder}, 1 step'; give each once" in refused(
        *asked, "-m", folder, "-m", folder
    )
