"""What a user of `onestill train` can do wrong, each through the real command: one line that names the fix."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from onestill.cli import main
from onestill.data import ShardWriter
from onestill.train import state
from tests.cli.commands.test_train import RECIPE
from tests.tiny import WIDTH
from tests.train.parts import write_parts

Refused = Callable[..., str]
DISTIL = """
name = "tiny"
method = "add"
out = "run"

[data]
shards = ["cached"]
images = false

[loop]
iterations = 2
batch_size = 2

[add]
teacher = "parts/model"
autoencoder = ""
text_encoder = ""

[add.features]
network = "teacher"

[add.heads]
width = 8
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def distil(here: Path, parts: Path) -> Path:
    """A recipe for the tiny model in `parts`."""
    (here / "parts").symlink_to(parts)
    (here / "distil.toml").write_text(DISTIL)
    return here / "distil.toml"


@pytest.fixture
def small(here: Path) -> Path:
    """A recipe of two iterations on `shards`, which the test fills."""
    (here / "small.toml").write_text(RECIPE.replace("iterations = 4", "iterations = 2"))
    return here / "small.toml"


def picture(side: int = 32) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def write(samples: dict[str, bytes]) -> None:
    """One shard in `shards` with files by name."""
    Path("shards").mkdir()
    with tarfile.open("shards/set.tar", "w") as tar:
        for name, data in samples.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def whole(names: str, side: int = 32) -> dict[str, bytes]:
    made = {}
    for name in names:
        made |= {f"{name}.png": picture(side), f"{name}.txt": b"noise"}
    return made


def test_a_device_that_is_none_is_told_by_a_dry_run_too(distil: Path, refused: Refused) -> None:
    for name in ("gpu", "banana"):
        said = refused("train", distil, "--dry-run", "--set", f'loop.device="{name}"')
        assert f"There is no device '{name}'; choose from auto, cpu, cuda" in said


def test_keys_and_values(refused: Refused, small: Path) -> None:
    assert "Did you mean 'iterations'" in refused("train", small, "--set", "loop.iteration=3")
    assert "loop.iterations must be at least 1, not 0" in refused("train", small, "--set", "loop.iterations=0")
    assert "from 0.0 to 1.0, not 7" in refused("train", small, "--set", "autoencoder.lr=7")


def test_batches_that_do_not_go_round(refused: Refused, small: Path) -> None:
    said = refused("train", small, "--dry-run", "--devices", 3)
    assert "not divisible by 3 process(es)" in said
    assert "make it a multiple of 3" in said
    said = refused("train", small, "--dry-run", "--devices", 2)
    assert "leave one sample of 2" in said
    assert "give each at least two" in said
    assert "nothing learnt" in refused("train", small, "--set", "loop.batch_size=1")


def test_shards_of_which_nothing_can_be_used(refused: Refused, small: Path) -> None:
    assert "no shard" in refused("train", small).casefold()
    write({"a.png": picture(), "b.png": picture()})
    assert "it has no caption" in refused("train", small)
    shutil.rmtree("shards")
    write({"a.png": b"no picture", "a.txt": b"words"})
    assert "Not one of 1 samples can be used" in refused("train", small)


def test_some_samples_that_cannot_be_used_are_left_out_and_named(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(whole("abc") | {"mute.png": picture(), "torn.png": picture()[:200], "torn.txt": b"words"})
    assert main(["train", str(small)]) == 0
    said = capsys.readouterr().err
    assert "note: left out set.tar:mute: it has no caption\n" in said
    assert "note: left out set.tar:torn: " in said


def test_pictures_of_other_sizes_make_no_batch(refused: Refused, small: Path) -> None:
    write(whole("a") | whole("b", 4))
    assert "(4, 4), (32, 32)] px make no batch: use shards of one size" in refused("train", small)


def test_shards_that_were_not_cached(refused: Refused, distil: Path) -> None:
    write(whole("ab"))
    said = refused("train", distil, "--set", 'data.shards=["shards"]')
    assert "the shards hold no 'latents'" in said
    assert "onestill data cache" in said


def cached(here: Path, channels: int, width: int) -> None:
    """Shards as another model's cache, with latents of `channels` and text `width` wide."""
    with ShardWriter(here / "cached") as writer:
        for i in range(2):
            arrays = {"latents": np.zeros((channels, 4, 4), np.float16), "text": np.zeros((16, width), np.float16)}
            arrays["mask"] = np.ones(16, np.bool_)
            writer.write(f"{i}", picture(), "noise", {}, suffix="png", arrays=arrays)


@pytest.mark.parametrize(("channels", "width"), [(16, WIDTH), (4, 48)])
def test_shards_of_another_model(refused: Refused, distil: Path, here: Path, channels: int, width: int) -> None:
    cached(here, channels, width)
    wrong = f"cached for another model: their latents have {channels} channels and their text is {width} wide"
    assert wrong in refused("train", distil)
    unet = "sample_size=4 channels=4 head_dim=8 groups=8 block_out_channels=[16] attention=[true]".split()
    sets = ["autoencoder=parts/model/vae", "text_encoder=parts/model", f"unet.text_width={WIDTH}"]
    sets += [f"unet.{part}" for part in unet]
    distil.write_text(DISTIL.replace('method = "add"', 'method = "diffusion"').split("[add]")[0])
    arguments = [part for one in sets for part in ("--set", f"diffusion.{one}")]
    assert wrong in refused("train", distil, *arguments)
    arguments += ["--set", "diffusion.unet.text_width=8"]
    assert "set diffusion.unet.text_width" in refused("train", distil, *arguments)


def test_shards_that_do_not_fit_a_tower(refused: Refused, distil: Path, here: Path) -> None:
    cached(here, 16, 48)
    distil.write_text(DISTIL.replace('method = "add"', 'method = "contrastive"').split("[add]")[0])
    arguments = ("--set", "contrastive.space=latents", "--set", "contrastive.channels=16")
    assert "set contrastive.channels and contrastive.text_width" in refused("train", distil, *arguments)


def test_parts_that_do_not_fit(refused: Refused, distil: Path, here: Path) -> None:
    def said(*sets: str) -> str:
        return refused("train", distil, "--dry-run", *[part for one in sets for part in ("--set", f"add.{one}")])

    tower = ("features.network=tower", "features.tower_layers=[0]")
    assert "trained on latents of 4 channels" in said(
        *tower, "features.tower=parts/latents", "discriminator_input.space=pixels"
    )
    assert "trained on pixels of 3 channels" in said(*tower, "features.tower=parts/pixels")
    assert "heads.width must be a multiple of 8" in said("heads.width=100")
    shutil.copytree("parts/model/text_encoder", "words")
    assert "holds no whole tokenizer" in said("text_encoder=words")
    distil.write_text(DISTIL.replace('method = "add"', 'method = "ladd"').replace("[add", "[ladd"))
    zeros = ("--set", "ladd.student_input.warm_weights=[0,0,0,0]")
    assert "warm_weights are all zero" in refused("train", distil, *zeros)


def test_autoencoders_that_do_not_fit_together(refused: Refused, small: Path) -> None:
    kl = ("--set", "autoencoder.kind=kl", "--set", "autoencoder.widths=[12, 24]")
    assert "autoencoder.widths must be multiples of 8" in refused("train", small, "--dry-run", *kl)
    blocks = ("--set", "autoencoder.encoder_blocks=[0, 1, 1]")
    assert "must be as long as each other" in refused("train", small, "--dry-run", *blocks)


def test_a_dry_run_tells_of_shards_that_are_not_there(
    distil: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(distil), "--dry-run"]) == 0
    assert "no shard or folder cached" in json.loads(capsys.readouterr().out)["missing"]
    cached(here, 4, WIDTH)
    assert main(["train", str(distil), "--dry-run"]) == 0
    assert "missing" not in json.loads(capsys.readouterr().out)


def test_a_student_of_other_latents(refused: Refused, distil: Path, here: Path) -> None:
    config = json.loads(Path("parts/model/unet/config.json").read_text())
    UNet2DConditionModel.from_config({**config, "in_channels": 8, "out_channels": 8}).save_pretrained(here / "eight")
    said = refused("train", distil, "--set", "add.student=eight")
    assert "the student's and the teacher's latents differ (8 and 4)" in said
    both = refused("train", distil, "--set", "add.student=eight", "--set", "add.teacher=eight", "--set",
                   "add.autoencoder=parts/model/vae", "--set", "add.text_encoder=parts/model")  # fmt: skip
    assert "the autoencoder's latents differ" in both


def test_predictions_that_do_not_fit(refused: Refused, distil: Path, here: Path) -> None:
    """Noise cannot be predicted where there is no signal to divide by; a path can be followed on its own table only."""
    shutil.copytree("parts/model", "eps")
    file = here / "eps/scheduler/scheduler_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "prediction_type": "epsilon", "rescale_betas_zero_snr": True}))
    assert "is no schedule to train on" in refused("train", distil, "--set", "add.teacher=eps")
    file.write_text(json.dumps({**told, "beta_end": 0.02}))
    distil.write_text(DISTIL.replace('method = "add"', 'method = "lcm"').split("[add]")[0])
    sets = ["lcm.teacher=parts/model", "lcm.autoencoder=", "lcm.text_encoder=", "lcm.student=eps"]
    arguments = [part for one in sets for part in ("--set", one)]
    assert "noise schedule must be the teacher's" in refused("train", distil, *arguments)


def test_a_checkpoint_from_another_recipe(refused: Refused, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(whole("abc"))
    assert main(["train", str(small)]) == 0
    capsys.readouterr()
    said = refused("train", small, "--resume", "--set", "loop.iterations=4", "--set", "autoencoder.lr=1e-5")
    assert "autoencoder.lr differ" in said


def test_a_full_disk(refused: Refused, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write(whole("abc"))
    monkeypatch.setattr(state, "save_file", full)
    # Saved before the first row of the log, which would be a second line.
    said = refused("train", small, "--set", "loop.iterations=4", "--set", "loop.log_every=4")
    assert "No space left on device" in said
    assert "make room" in said
    assert [path.name for path in Path("run/checkpoints").iterdir()] == []
