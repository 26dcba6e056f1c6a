"""What a model in a folder is, read from its configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from onestill.checkpoint import (
    MANIFEST,
    describe,
)
from onestill.errors import CheckpointError


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_a_model_is(tiny_folder: Path) -> None:
    info = describe(tiny_folder)
    assert (info.name, info.version, info.licence) == ("tiny", "1", "Apache-2.0")
    assert (info.height, info.width, info.sizes) == (32, 32, ((32, 32),))
    assert (info.latent_shape, info.vae_scale_factor, info.scaling_factor) == ((4, 4, 4), 8, 0.5)
    assert (info.max_tokens, info.use_attention_mask, info.sampler) == (16, False, "euler_ancestral")
    assert info.schedule.prediction_type == "v_prediction"
    assert info.schedule.alphas_cumprod[-1] == 0
    assert info.schedule.timesteps(1) == [999]
    assert info.made == {"by": "tests/tiny.py"}


def test_a_model_without_a_manifest_takes_its_folders_name(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    info = describe(folder)
    assert (info.name, info.num_inference_steps, info.guidance_scale) == (folder.name, 1, 1.0)


def test_another_kind_of_pipeline_is_refused(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(CheckpointError, match="FluxPipeline"):
        describe(folder)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_spoilt_config_is_named(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.rsplit("/", 1)[-1]):
        describe(folder)


def test_configs_that_do_not_fit_together_are_one_sentence(folder: Path) -> None:
    edit_json(folder / "vae/config.json", block_out_channels=None)
    with pytest.raises(CheckpointError, match="do not fit together"):
        describe(folder)


def test_a_schedule_that_cannot_be_drawn_with_is_refused(folder: Path) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", beta_schedule="mystery")
    with pytest.raises(CheckpointError, match="mystery"):
        describe(folder)
