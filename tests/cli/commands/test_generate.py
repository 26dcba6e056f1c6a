from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onestill import load
from onestill.cli import main
from onestill.cli.options import parse_loras
from onestill.engine.device import choose

Refused = Callable[..., str]
Drawn = Callable[..., dict[str, object]]


@pytest.fixture
def drawn(tiny_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, object]]:
    """Run `generate --json` with the tiny model and return what it printed, read."""

    def run(*arguments: object) -> dict[str, object]:
        command = ["generate", "--model", str(tiny_folder), "--json", *(str(argument) for argument in arguments)]
        assert main(command) == 0
        return json.loads(capsys.readouterr().out)

    return run


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


# --- where ---


def test_where_torch_draws_is_told_in_one_line_where_nobody_chose(
    tiny_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for chosen, lines in (([], 1), (["--device", "auto"], 1), (["--device", "cpu"], 0)):
        command = ["generate", "a star", "--model", str(tiny_folder), "--engine", "torch", "--json", *chosen]
        assert main(command) == 0
        said = capsys.readouterr()
        report = json.loads(said.out)
        assert (report["engine"], report["device"]) == ("torch", choose("cpu" if "cpu" in chosen else None))
        assert said.err.count("\n") == lines
        assert said.err.startswith("note: torch computes on " if lines else "")


def test_a_mistake_is_one_line_on_torch_too(refused: Refused, tiny_folder: Path, here: Path) -> None:
    torch = ["--model", tiny_folder, "--engine", "torch"]
    assert "from 1 to 50" in refused("generate", "a star", *torch, "--steps", 51)


def test_of_the_cpus_own_engine_nothing_is_told(
    tiny_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for chosen in ([], ["--device", "auto", "--engine", "auto"]):
        assert main(["generate", "a star", "--model", str(tiny_folder), *chosen]) == 0
        assert capsys.readouterr().err == ""


# --- pictures -------------------------------------------------------------------------------------------------------


def test_json_says_what_the_contract_says(drawn: Drawn) -> None:
    report = drawn("a red apple", "--seed", 1, "--dtype", "float32")
    picture = {"path": "a-red-apple-1.png", "prompt": "a red apple", "seed": 1, "width": 32, "height": 32}
    assert report["images"] == [picture]
    assert set(report["timings"]) == {"load_ms", "encode_ms", "denoise_ms", "decode_ms", "total_ms"}
    assert all(value > 0 for value in report["timings"].values())
    assert {name: report[name] for name in ("model", "engine", "device", "dtype", "num_inference_steps", "notes")} == {
        "model": "tiny",
        "engine": "openvino",
        "device": "cpu",
        "dtype": "float32",
        "num_inference_steps": 1,
        "notes": [],
    }


def test_the_picture_is_the_pipelines(drawn: Drawn, tiny_folder: Path) -> None:
    # In float32: the command loads quickly, and networks that are put together otherwise round otherwise in bfloat16.
    drawn("a red apple", "--seed", 7, "--steps", 2, "--dtype", "float32")
    expected = load(tiny_folder, dtype="float32")("a red apple", seed=7, num_inference_steps=2).images[0]
    assert abs(pixels("a-red-apple-7.png").astype(int) - np.asarray(expected)).max() <= 1


def test_paths_are_printed_one_a_line(tiny_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a star", "a heart", "--model", str(tiny_folder), "--seed", "3", "--num", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == ["a-star-3.png", "a-star-4.png", "a-heart-5.png", "a-heart-6.png"]
    assert said.err == ""


def test_a_picture_is_the_same_in_any_batch(drawn: Drawn) -> None:
    many = drawn("a star", "--seed", 1, "--num", 11, "--out", "many")["images"]
    assert [picture["seed"] for picture in many] == list(range(1, 12))
    drawn("a star", "--seed", 10, "--out", "one.png")
    difference = pixels("one.png").astype(int) - pixels(many[9]["path"])
    assert abs(difference).max() <= 1


def test_the_seed_is_random_unless_given(drawn: Drawn) -> None:
    first, second = (drawn("a star")["images"][0]["seed"] for _ in range(2))
    assert first != second


def test_a_default_name_takes_the_next_free_number(drawn: Drawn, here: Path) -> None:
    (here / "a-star-1.png").write_bytes(b"kept")
    assert drawn("a star", "--seed", 1)["images"][0]["path"] == "a-star-1-2.png"
    assert (here / "a-star-1.png").read_bytes() == b"kept"


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "new/folder/x.png"])
def test_out_names_a_file(drawn: Drawn, name: str) -> None:
    assert drawn("a star", "--out", name)["images"][0]["path"] == name
    assert pixels(name).shape == (32, 32, 3)


def test_force_replaces(drawn: Drawn, here: Path) -> None:
    (here / "x.png").write_bytes(b"old")
    drawn("a star", "--out", "x.png", "--force")
    assert pixels("x.png").shape == (32, 32, 3)


def test_a_png_carries_its_parameters(drawn: Drawn) -> None:
    drawn("a red star, purple", "--seed", 5, "--steps", 3, "--out", "x.png")
    with Image.open("x.png") as picture:
        text = picture.text
    assert text["prompt"] == "a red star, purple"
    assert text["seed"] == "5"
    assert text["num_inference_steps"] == "3"
    assert text["model"] == "tiny 1"
    assert text["version"].startswith("onestill ")


def test_a_picture_to_start_from(drawn: Drawn, here: Path) -> None:
    Image.new("RGB", (50, 40), "red").save("start.png")
    weak = drawn("a star", "--seed", 1, "--image", "start.png", "--steps", 4, "--strength", 0.3, "--out", "weak.png")
    assert weak["images"][0]["width"] == 32
    drawn("a star", "--seed", 1, "--steps", 4, "--out", "none.png")
    assert (pixels("weak.png") != pixels("none.png")).any()


def test_an_over_long_prompt_is_drawn_and_says_how_many_tokens_were_cut(drawn: Drawn) -> None:
    (note,) = drawn("apple " * 30)["notes"]
    assert "its last 16 tokens were cut" in note


def test_the_torch_engine_draws_nearly_the_same(drawn: Drawn) -> None:
    drawn("a star", "--seed", 1, "--dtype", "float32", "--out", "openvino.png")
    assert drawn("a star", "--seed", 1, "--engine", "torch", "--out", "torch.png")["engine"] == "torch"
    difference = pixels("openvino.png").astype(float) - pixels("torch.png")
    assert np.abs(difference).mean() < 1


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([""], "prompt is empty"),
        (["  \n"], "prompt is empty"),
        (["a star", "", "--num", 8], "prompt is empty"),
        (["a star", "--size", "33x32"], "cannot draw 33x32 pixels; choose from 32x32"),
        (["a star", "--size", "0x0"], "choose from 32x32"),
        (["a star", "--size", "big"], "WIDTHxHEIGHT"),
        (["a star", "--steps", 0], "from 1 to 50"),
        (["a star", "--steps", 51], "from 1 to 50"),
        (["a star", "--steps", -1], "from 1 to 50"),
        (["a star", "--seed", -1], "seed"),
        (["a star", "--seed", 2**63], "seed"),
        (["a star", "--seed", 2**63 - 9, "--num", 10], "seed"),
        (["a star", "--num", 0], "--num"),
        (["a star", "--guidance-scale", "nan"], "guidance_scale"),
        (["a star", "--sampler", "eulr", "--steps", 2], "euler"),
        (["a star", "--engine", "openvin"], "Did you mean 'openvino'?"),
        (["a star", "--device", "cuda", "--engine", "openvino"], "torch"),
        (["a star", "--device", "gpu"], "Did you mean 'cuda'?"),
        (["a star", "--device", "cuda:99"], "There is no 'cuda:99' here"),
        (["a star", "--dtype", "float8"], "float32"),
        (["a star", "--strength", 0.5], "--image"),
        (["a star", "--image", "no.png"], "no picture 'no.png'"),
        (["a star", "--image", "text.png"], "cannot be read as a picture"),
        (["a star", "--image", "text.png/x.png"], "cannot be read as a picture"),
        (["a star", "--image", "start.png", "--strength", 0], "strength"),
        (["a star", "--image", "start.png", "--strength", 1.5], "strength"),
        (["a star", "--num", 2, "--out", "x.png"], "2 pictures; give a folder"),
        (["a star", "--out", "x.gif"], "end it in .png"),
        (["a star", "--out", "text.png"], "--force"),
        (["a star", "--out", "text.png/x.png"], "not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    refused: Refused, tiny_folder: Path, here: Path, arguments: list[object], told: str
) -> None:
    Path("text.png").write_text("this is no picture")
    Image.new("RGB", (32, 32)).save("start.png")
    assert told in refused("generate", "--model", tiny_folder, *arguments)
    assert sorted(path.name for path in here.iterdir()) == ["start.png", "text.png"]
    assert Path("text.png").read_text() == "this is no picture"


def test_an_unknown_model_is_told_its_near_matches(refused: Refused, here: Path) -> None:
    assert "no model named 'icoms'" in refused("generate", "a star", "--model", "icoms")


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def test_a_folder_that_is_no_model(refused: Refused, here: Path) -> None:
    assert "no model" in refused("generate", "a star", "--model", here)
    assert "no model at" in refused("generate", "a star", "--model", here / "nowhere")


def test_a_truncated_file_is_named(refused: Refused, here: Path, broken: Path) -> None:
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    told = refused("generate", "a star", "--model", broken)
    assert str(weights) in told
    assert "truncated" in told


def test_a_changed_file_is_named(refused: Refused, here: Path, broken: Path) -> None:
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)
    assert str(weights) in refused("generate", "a star", "--model", broken)


def test_a_missing_file_is_named(refused: Refused, here: Path, broken: Path) -> None:
    (broken / "unet" / "config.json").unlink()
    assert "unet/config.json" in refused("generate", "a star", "--model", broken)


def test_a_pickle_is_not_opened(refused: Refused, here: Path, broken: Path) -> None:
    for name in ("model.ckpt", "model.pt", "model.bin"):
        (here / name).write_bytes(b"\x80\x02}q\x00.")
        assert "pickle" in refused("generate", "a star", "--model", here / name)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "pickle" in refused("generate", "a star", "--model", broken)


def test_a_missing_extra_is_one_line_with_the_command(
    refused: Refused, tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what Python itself holds for a module that cannot be imported
    told = refused("generate", "a star", "--model", tiny_folder, "--engine", "torch")
    assert "pip install 'onestill[torch]'" in told


def test_a_picture_that_cannot_be_written_leaves_no_part_of_it(
    refused: Refused, tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, file: object, *arguments: object, **options: object) -> None:
        file.write(b"half a picture")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert "No space left on device" in refused("generate", "a star", "--model", tiny_folder, "--out", "x.png")
    assert list(here.iterdir()) == []


def test_a_tilde_that_the_shell_left_is_the_home(
    here: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for arguments in (["--out=~/made/a.png"], ["--image=~/made/a.png", "--out", "~/made"]):
        assert main(["generate", "~/ a star", "--seed", "1", "--model", str(tiny_folder), *arguments]) == 0
    made = sorted(tmp_path.glob("home/made/*"))
    assert [path.name for path in made] == ["a-star-1.png", "a.png"]
    assert not list(here.iterdir())
    assert parse_loras(["~/x.safetensors:0.5"]) == {tmp_path / "home/x.safetensors": 0.5}


def test_without_a_home_it_draws(
    here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    pwd = pytest.importorskip("pwd")

    def nobody(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)  # of a container's user who is in no file
    assert main(["generate", "a star", "--seed", "1", "--model", str(tiny_folder), "--out", "a.png"]) == 0
    assert (here / "a.png").is_file()
    assert main(["doctor", "--no-draw", "--json"]) == 0
    capsys.readouterr()
    assert "give a --database" in refused("keys", "list")
    assert "no picture" in refused("generate", "a star", "--image", "~/a.png")
