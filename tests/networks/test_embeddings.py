"""Trained words for prompts (textual inversion): in files of every form, and in a folder's own vocabulary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from onestill.checkpoint import Additions, describe
from onestill.errors import CheckpointError, ModelNotFoundError
from onestill.networks.libraries import quiet_libraries
from onestill.networks.load import load_components
from onestill.text.tokenize import PromptTokenizer, write_clip_vocabulary
from tests.on_cpu import load
from tests.tiny_sd import TEXT, tiny_sd

WORD = "<cat-toy>"
PROMPTS = [f"a {WORD} on a mat", "a cat on a mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd15", "sd15")


def vectors(count: int) -> torch.Tensor:
    return torch.randn(count, TEXT, generator=torch.Generator().manual_seed(1)) * 0.05


def levels(pipe: Any) -> Any:
    images = pipe(PROMPTS, seed=1, num_inference_steps=1, guidance_scale=1.0).images
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


@pytest.mark.parametrize("count", [1, 3])
def test_a_word_is_diffusers_own(folder: Path, count: int, tmp_path: Path) -> None:
    file = tmp_path / "any.safetensors"
    save_file({WORD: vectors(count)}, file)
    info = describe(folder, Additions.of(embedding=file))
    ids = PromptTokenizer(info)(PROMPTS).ids
    with quiet_libraries():
        theirs = diffusers.DiffusionPipeline.from_pretrained(str(folder))
        theirs.load_textual_inversion({WORD: vectors(count)}, token=WORD)
        prompts = [theirs.maybe_convert_prompt(prompt, theirs.tokenizer) for prompt in PROMPTS]
        expected = theirs.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        states = theirs.text_encoder(expected)[0]
    np.testing.assert_array_equal(ids, expected.numpy())
    found = load_components(info, only=("text_encoder",))["text_encoder"](torch.from_numpy(ids))[0]
    torch.testing.assert_close(found, states, rtol=0, atol=1e-5)


def test_a_file_is_named_by_its_tensor_or_itself(folder: Path, tmp_path: Path) -> None:
    save_file({"emb_params": vectors(2)}, tmp_path / "charm.safetensors")
    (found,) = describe(folder, Additions.of(embedding=[tmp_path / "charm.safetensors"])).embeddings
    assert (found.tokens, found.first_id) == (("charm", "charm_1"), 49408)
    plain, changed = levels(load(folder)), levels(load(folder, embedding=tmp_path / "charm.safetensors"))
    np.testing.assert_array_equal(changed, plain)  # of prompts that do not name it


def test_sdxl_takes_both_sides(tmp_path: Path) -> None:
    xl = tiny_sd(tmp_path / "xl", "sdxl")
    save_file({"clip_l": vectors(1), "clip_g": vectors(1) * 2}, tmp_path / "toy.safetensors")
    info = describe(xl, Additions.of(embedding=tmp_path / "toy.safetensors"))
    parts = load_components(info, only=info.text_encoders)
    for name, scale in (("text_encoder", 1), ("text_encoder_2", 2)):
        rows = parts[name].get_input_embeddings().weight
        torch.testing.assert_close(rows[49408:], vectors(1) * scale)
    save_file({WORD: vectors(1)}, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="no embedding for text_encoder and text_encoder_2"):
        describe(xl, Additions.of(embedding=tmp_path / "one.safetensors"))


def test_what_is_no_embedding_of_the_family_is_refused(folder: Path, tmp_path: Path) -> None:
    save_file({WORD: torch.zeros(1, TEXT + 1)}, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="for another family"):
        describe(folder, Additions.of(embedding=tmp_path / "wide.safetensors"))
    with pytest.raises(ModelNotFoundError, match="no embedding"):
        describe(folder, Additions.of(embedding=tmp_path / "gone.safetensors"))
    save_file({WORD: vectors(1)}, tmp_path / "a.safetensors")
    twice = [tmp_path / "a.safetensors"] * 2
    with pytest.raises(CheckpointError, match="is there twice"):
        PromptTokenizer(describe(folder, Additions.of(embedding=twice)))


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder"])
def test_words_in_a_folders_vocabulary_are_transformers_own(folder: Path, form: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tokenizer = copy / "tokenizer"
    (tokenizer / "tokenizer.json").unlink(missing_ok=True)
    write_clip_vocabulary(tokenizer)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    if form == "added_tokens.json":
        (tokenizer / form).write_text(json.dumps({WORD: 49408}))
    else:
        config[form] = {"49408": {"content": WORD, "lstrip": False, "normalized": True, "rstrip": False}}
        config[form]["49408"] |= {"single_word": False, "special": False}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.CLIPTokenizer.from_pretrained(tokenizer)
    expected = theirs(PROMPTS, padding="max_length", max_length=77, return_tensors="np").input_ids
    found = PromptTokenizer(describe(copy))(PROMPTS).ids
    assert 49408 in found[0]
    np.testing.assert_array_equal(found, expected)
