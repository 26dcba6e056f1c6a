"""Every stage of recipes/icons, first as it is read, then all in order in a tiny form on the packaged sample set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from onestill.data import ShardReader, sample_shards
from onestill.data.recipe_reader import RecipeReader
from onestill.errors import DataError
from onestill.networks.contrastive import ContrastiveModel
from onestill.networks.denoiser import load_unet
from onestill.networks.latents import LatentSpace
from onestill.networks.text_encoder import TextEncoder, open_text_encoder
from onestill.train.lpips import LPIPS
from onestill.train.recipe import METHODS, read_recipe
from onestill.train.run import train_recipe
from recipes.icons import cache, train
from tests.tiny import MAX_TOKENS, WIDTH, tiny_model
from tests.train.parts import save_cnn

RECIPES = sorted((Path(__file__).parents[2] / "recipes/icons").glob("*/*.toml"))
STAGES = {path.stem: path for path in RECIPES if path.parent.name == "cpu"}

SHORT = ["loop.iterations=2", "loop.batch_size=4", "loop.log_every=1", "loop.threads=1", "loop.warmup=0"]
UNET = ["sample_size=8", "channels=4", "head_dim=8", "groups=8", f"text_width={WIDTH}"]
UNET += ["block_out_channels=[16, 32]", "attention=[false, true]"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_parses(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.method in METHODS
    assert recipe.out.startswith("runs/")
    assert recipe.data.shards


@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_the_stages_hand_on_what_they_make(form: str) -> None:
    stages = {stage: read_recipe(train.recipe(stage, form)) for stage in train.STAGES if train.trains(stage)}
    made = {recipe.method: recipe.out for recipe in stages.values()}
    assert set(made) == {"autoencoder", "contrastive", "diffusion", "add", "decoder"}
    student = stages["4-student"].options
    assert student.teacher == f"{made['diffusion']}/export/unet"
    assert student.autoencoder == f"{made['autoencoder']}/export/vae"
    assert stages["3-teacher"].options.autoencoder == student.autoencoder
    if form == "cpu":
        larger = stages["5-decoder"].options
        assert (larger.autoencoder, larger.student) == (student.autoencoder, f"{made['add']}/export/unet")
    for stage in ("3-teacher", "4-student"):
        assert stages[stage].loop.device == {"cpu": "cpu", "gpu": "cuda"}[form]


def test_both_forms_train_the_same_networks() -> None:
    (cpu, gpu), (student, other) = (
        [read_recipe(train.recipe(stage, form)).options for form in train.FORMS] for stage in ("3-teacher", "4-student")
    )
    assert cpu.unet == gpu.unet
    assert cpu.autoencoder == gpu.autoencoder == student.autoencoder == other.autoencoder
    assert student.features == other.features
    assert (student.heads.width, student.heads.blocks) == (other.heads.width, other.heads.blocks)
    assert student.student_input == other.student_input


@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_one_command_runs_the_stages_in_order(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--parquet", "icons.parquet", "--form", form, "--from", "cache", "--to", "5-decoder", "--dry-run"])
    told = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert list(told) == ["cache", "2-evaluator", "3-teacher", "4-student", "large-shards", "5-decoder"]
    for stage in ("3-teacher", "4-student"):
        assert f"icons/{form}/" in told[stage]
    assert ("icons-gpu/student" in told["5-decoder"]) == (form == "gpu")


def test_each_stage_has_a_mark_of_its_own_that_comes_last(tmp_path: Path) -> None:
    made = {stage: train.command(stage, "cpu", "t.parquet", tmp_path / "r", tmp_path / "d") for stage in train.STAGES}
    assert len({result for result, _ in made.values()}) == len(made)
    for stage in ("shards", "cache", "large-shards"):
        result, line = made[stage]
        assert line[line.index("--done") + 1] == str(result)
    result, line = made["ship-teacher"]
    assert line[line.index("--out") + 1] == str(result.parent)


def test_the_icons_command_passes_sizes_and_settings_on(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--samples", "150000", "--size", "64", "--set", "loop.seed=7", "--set", 'out="a b"', "--dry-run"]
    assert train.main(["--parquet", "icons.parquet", "--to", "1-autoencoder", *given]) == 0
    shards, _, autoencoder = capsys.readouterr().out.splitlines()
    assert "--samples 150000" in shards
    assert "--size 64" in shards
    assert "--set" not in shards
    assert autoencoder.endswith('--set loop.seed=7 --set out="a b"')
    assert "--samples" not in autoencoder
    train.main(["--parquet", "icons.parquet", "--to", "shards", "--dry-run"])
    plain = capsys.readouterr().out
    assert "--samples 48000" in plain
    assert "--size 128" in plain


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run(stage: str, runs: Path, shards: Path | str, *more: str) -> Any:
    sets = [f'out="{runs / stage}"', f'data.shards=["{shards}"]', *SHORT, *more]
    return train_recipe(STAGES[stage], sets, reader=RecipeReader)


def rows(runs: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_all_stages_in_a_tiny_form(runs: Path) -> None:
    torch.set_num_threads(1)
    assert sample_shards()
    words = tiny_model(runs / "model", autoencoder="tiny", openvino=False)
    sizes = ["latent_channels=4", "encoder_width=4", "decoder_width=4", "perceptual=0.5", "perceptual_window=16"]
    save_file(LPIPS().state_dict(), runs / "lpips.safetensors")
    save_cnn(runs / "lite0")
    sizes += [f'perceptual_network="{runs}/lpips.safetensors"', "adversarial_from=1"]
    sizes += ["encoder_blocks=[0, 0, 1, 1, 1]", "decoder_blocks=[1, 1, 1, 0, 0]"]
    run("1-autoencoder", runs, "sample", *[f"autoencoder.{size}" for size in sizes])
    vae = runs / "1-autoencoder/export/vae"
    arguments = ["--shards", *map(str, sample_shards()), "--autoencoder", str(vae), "--out", str(runs / "cached")]
    cache.main([*arguments, "--text-encoder", str(words), "--samples", "12", "--threads", "1"])
    check_cache(runs, LatentSpace.load(vae), open_text_encoder(str(words)))

    tower = ["width=32", "depth=1", "embedding_width=16", f"text_width={WIDTH}"]
    run("2-evaluator", runs, runs / "cached", *[f"contrastive.{size}" for size in tower])
    assert ContrastiveModel.load(runs / "2-evaluator/export").embed_image(torch.zeros(1, 3, 128, 128)).shape == (1, 16)

    parts = [f'autoencoder="{vae}"', f'text_encoder="{words}"']
    teacher = [f"diffusion.{part}" for part in (*parts, "sheet_steps=2", *(f"unet.{size}" for size in UNET))]
    run("3-teacher", runs, runs / "cached", *teacher)

    given = [
        f"add.{part}"
        for part in (
            *parts,
            f'teacher="{runs}/3-teacher/export/unet"',
            f'features.cnn="{runs}/lite0"',
            "heads.width=8",
            "adversarial.heads_first=0",
        )
    ]
    run("4-student", runs, runs / "cached", *given)
    student, parent = (load_unet(runs / stage / "export/unet") for stage in ("4-student", "3-teacher"))
    assert student.config["block_out_channels"] == parent.config["block_out_channels"]
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), parent.parameters(), strict=True))

    given = [f"decoder.{part}" for part in (*parts, f'student="{runs}/4-student/export/unet"', "window=4")]
    given += ["decoder.encoder_blocks=[0, 0, 0, 1, 1, 1]", "decoder.decoder_blocks=[1, 1, 1, 0, 0, 0]"]
    given += [f'decoder.perceptual_network="{runs}/lpips.safetensors"', "decoder.perceptual_window=16"]
    run("5-decoder", runs, "sample", *given, "decoder.adversarial_from=1", "decoder.discriminator_width=4")
    larger = LatentSpace.load(runs / "5-decoder/export/vae")
    assert (larger.factor, larger.scale) == (2 * LatentSpace.load(vae).factor, LatentSpace.load(vae).scale)

    for stage in STAGES:
        last = rows(runs, stage)[-1]
        assert (last["iteration"], last["nimg"], last["bad_steps"]) == (2, 8, 0)
        assert (runs / stage / "sheets/00000002.png").is_file()


def check_cache(runs: Path, space: LatentSpace, encoder: TextEncoder) -> None:
    """The cached arrays are what the networks make of the pictures and words beside them."""
    samples = list(ShardReader(runs / "cached", shuffle=False, epochs=1))
    assert len(samples) == 12
    pictures = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = space.encode(pictures)  # [B, 4, 8, 8]
    assert latents.std().item() == pytest.approx(1, abs=0.3)
    told = encoder([sample.caption for sample in samples])
    text, mask = told.text, told.mask
    for i, sample in enumerate(samples):
        assert sample.arrays["text"].shape == (MAX_TOKENS, WIDTH)
        np.testing.assert_allclose(sample.arrays["latents"], latents[i].numpy(), rtol=0.01, atol=0.01)
        np.testing.assert_allclose(sample.arrays["text"], text[i].numpy(), rtol=0.01, atol=0.01)
        assert (sample.arrays["mask"] == mask[i].numpy()).all()


def test_shards_without_what_a_stage_needs(runs: Path) -> None:
    with pytest.raises(DataError, match=r"hold no 'latents'.*recipes\.icons\.cache"):
        run("2-evaluator", runs / "wrong", "sample", "contrastive.width=32", "contrastive.depth=1")
    with pytest.raises(DataError, match=r"data\.images = true"):
        run("1-autoencoder", runs / "wrong", "sample", "data.images=false", "autoencoder.perceptual=0")


def test_a_dry_run_builds_and_trains_nothing(runs: Path) -> None:
    said: list[str] = []
    out = f'out="{runs / "dry"}"'
    assert (
        train_recipe(
            STAGES["1-autoencoder"],
            [out, "autoencoder.perceptual=0"],
            reader=RecipeReader,
            dry_run=True,
            say=said.append,
        )
        is None
    )
    plan = json.loads(said[0])
    assert plan["method"] == "autoencoder"
    assert plan["parameters"]["autoencoder"] > 100_000
    assert f'"decoder_blocks": {plan["autoencoder"]["decoder_blocks"]}' in said[0]  # lists on one line
    assert not (runs / "dry").exists()
