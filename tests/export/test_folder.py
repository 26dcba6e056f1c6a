from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from onestill.checkpoint import MANIFEST, describe, weights_file
from onestill.errors import CheckpointError, OutputError
from onestill.export.folder import save_folder, write_manifest
from tests.tiny import tiny_kl, tiny_schedule, tiny_text_encoder, tiny_tokenizer, tiny_unet


def parts() -> dict[str, object]:
    torch.manual_seed(0)
    return {
        "unet": tiny_unet(),
        "vae": tiny_kl(),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "schedule": tiny_schedule(),
    }


def test_the_modules_are_saved_in_half_and_stay_as_they_are(tmp_path: Path) -> None:
    modules = parts()
    before = copy.deepcopy(modules["unet"].state_dict())  # type: ignore[attr-defined]
    folder = save_folder(**modules, folder=tmp_path / "new")  # type: ignore[arg-type]
    after = modules["unet"].state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before)
    saved = load_file(weights_file(folder, "unet"))
    assert {value.dtype for value in saved.values()} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(saved["conv_in.bias"], before["conv_in.bias"].half().numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert weights_file(folder, "unet").stat().st_mode & 0o777 == 0o644
    assert describe(folder).schedule.alphas_cumprod == pytest.approx(tiny_schedule().alphas_cumprod, abs=1e-6)


def test_a_folder_is_replaced_only_by_force(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    save_folder(**parts(), folder=folder)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="exists"):
        save_folder(**parts(), folder=folder)  # type: ignore[arg-type]
    (folder / "left-over").write_text("")
    save_folder(**parts(), folder=folder, dtype="float32", force=True)  # type: ignore[arg-type]
    assert not (folder / "left-over").exists()
    assert {value.dtype for value in load_file(weights_file(folder, "vae")).values()} == {np.dtype(np.float32)}


def test_what_diffusers_would_draw_differently_is_refused(tmp_path: Path) -> None:
    modules = parts()
    modules["vae"].register_to_config(shift_factor=0.1)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="shift_factor"):
        save_folder(**modules, folder=tmp_path / "new")  # type: ignore[arg-type]
    modules = parts()
    with torch.no_grad():
        modules["unet"].conv_in.bias[0] = 1e6  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"conv_in\.bias.*float16"):
        save_folder(**modules, folder=tmp_path / "new")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_lists_every_file_and_says_what_the_model_is(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))
    (folder / "README.md").write_text("# tiny\n")
    made = {"hours": 0.1, "data": ["none"]}
    write_manifest(
        folder, name="other", version="2", num_inference_steps=4, guidance_scale=2.5, styles=["3d"], made=made
    )
    manifest = json.loads((folder / MANIFEST).read_text())
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == names - {MANIFEST}
    info = describe(folder)
    assert (info.name, info.version, info.num_inference_steps, info.guidance_scale) == ("other", "2", 4, 2.5)
    assert (info.styles, info.made) == (("3d",), made)
