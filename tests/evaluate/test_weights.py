from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

from onestill.checkpoint import ComponentFile, Lora, describe
from onestill.evaluate import fingerprint


def test_a_folders_hash_is_of_its_weights_wherever_it_lies(tiny_folder: Path, tmp_path: Path) -> None:
    info = describe(tiny_folder)
    expected = hashlib.sha256()
    for path in sorted(tiny_folder.rglob("*.safetensors")):
        expected.update(str(path.relative_to(tiny_folder)).encode() + path.read_bytes())
    # What evaluations kept by this very hash stays good.
    assert fingerprint(info) == expected.hexdigest()[:16]
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    assert fingerprint(replace(info, path=copy)) == fingerprint(info)
    with (copy / "unet/diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert fingerprint(replace(info, path=copy)) != fingerprint(info)


def test_an_openvino_form_alone_has_a_hash(tiny_folder: Path, tmp_path: Path) -> None:
    info = replace(describe(tiny_folder), path=tmp_path)
    shutil.copytree(tiny_folder / "openvino", tmp_path / "openvino")
    whole = fingerprint(info)
    (tmp_path / "openvino/unet.bin").write_bytes(b"other")
    assert fingerprint(info) != whole


def test_a_file_and_what_is_put_on_top_count(tiny_folder: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    folder = describe(tiny_folder)
    file = replace(folder, path=one, component_files={"unet": ComponentFile("UNet2DConditionModel", {}, one)})
    infos = [
        folder,
        replace(folder, component_files={"unet": ComponentFile("UNet2DConditionModel", {}, one)}),
        replace(folder, component_files={"unet": ComponentFile("UNet2DConditionModel", {}, other)}),
        replace(folder, component_files={"vae": ComponentFile("AutoencoderTiny", {}, other)}),
        replace(folder, loras=(Lora(one),)),
        replace(folder, loras=(Lora(one, 0.5),)),
        file,
        replace(file, path=other, component_files={}),
    ]
    assert len({fingerprint(info) for info in infos}) == len(infos)
    assert fingerprint(replace(file, component_files={})) == fingerprint(file)
