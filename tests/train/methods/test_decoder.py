"""The larger decoder: what it keeps of the old one, what it is shown, and that it learns to draw."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from onestill.errors import RecipeError
from onestill.networks.latents import LatentSpace
from onestill.train.methods.decoder import Method, Options, grown, halved
from onestill.train.optim.step import Update, optimize
from onestill.train.recipe import LoopOptions
from onestill.train.state import TrainState, start_ema
from tests.tiny import tiny_kl, tiny_model

PX = 64  # twice the tiny model's side; its latents have 4 a side
SIZES: dict[str, Any] = {"encoder_blocks": [0, 1, 1, 1, 1], "decoder_blocks": [1, 1, 1, 1, 0], "window": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("decoder") / "model", autoencoder="tiny", openvino=False)


def options(model: Path, **more: Any) -> Options:
    parts = {"autoencoder": str(model / "vae"), "student": str(model / "unet"), "text_encoder": str(model)}
    return Options(**{**parts, **SIZES, "discriminator_width": 4, "sheet_prompts": ["a red star"], **more})


def new_method(model: Path, **more: Any) -> tuple[Method, TrainState]:
    method = Method(options(model, **more), LoopOptions(seed=3))
    method.to(torch.device("cpu"))
    averages = {"autoencoder": start_ema(method.autoencoder)}
    return method, TrainState(method.networks, method.optimizers, averages, torch.Generator().manual_seed(0))


def batch(count: int = 4) -> dict[str, Any]:
    """Squares of one colour on white, each at a place of its own."""
    draw = torch.Generator().manual_seed(5)
    x = torch.ones(count, 3, PX, PX)
    for one in x:
        row, column = torch.randint(4, 24, (2,), generator=draw).tolist()
        one[:, row : row + 32, column : column + 32] = (2 * torch.rand(3, generator=draw) - 1).view(3, 1, 1)
    return {"images": x, "captions": ["a red square"] * count}


def weights(network: torch.nn.Module) -> list[Tensor]:
    return [value.clone() for value in network.state_dict().values()]


def test_the_layers_nearest_the_latents_are_the_old_ones(model: Path) -> None:
    old = LatentSpace.load(model / "vae")
    torch.manual_seed(1)
    one, other = (grown(old, options(model)) for _ in range(2))  # from different random weights
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert 0 < sum(same) < len(same)
    for half, order in ((one.decoder, 1), (one.encoder, -1)):
        its, mine = (list(network.layers)[::order] for network in (getattr(old.autoencoder, _name(one, half)), half))
        for layer, copy in list(zip(its, mine, strict=False))[:5]:
            assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), copy.parameters(), strict=True))
    assert LatentSpace.factor.fget(old) * 2 == 2 ** (len(one.config.decoder_block_out_channels) - 1)  # type: ignore[attr-defined]


def _name(autoencoder: Any, half: Any) -> str:
    return "decoder" if half is autoencoder.decoder else "encoder"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_students_latents_know_their_picture_as_well_as_it_saw_it(model: Path, share: float) -> None:
    method, state = new_method(model, student_share=share, latent_noise=0.0)
    told = batch(8)
    clean = method.old.encode(halved(told["images"]))
    latents, known = method.latents(clean, told["captions"], state)
    made = round(8 * share)
    torch.testing.assert_close(latents[made:], clean[made:])
    assert (known[made:] == 1).all()
    alphas = {
        round(float(alpha), 5) for alpha in method.student.signal(torch.tensor([999, 749, 499, 249]))[0].flatten()
    }
    assert {round(float(value), 5) for value in known[:made].flatten()} <= alphas
    assert all(not torch.allclose(latents[i], clean[i], atol=0.05) for i in range(made))


def test_from_pure_noise_nothing_of_the_picture_is_left(model: Path) -> None:
    found = []
    for shade in (-1.0, 1.0):
        method, state = new_method(model, student_share=1.0)
        clean = method.old.encode(halved(torch.full((16, 3, PX, PX), shade)))
        found.append(method.latents(clean, ["a red star"] * 16, state))
    (one, known), (other, _) = found
    blind = known.flatten() == 0
    assert 0 < blind.sum() < 16
    torch.testing.assert_close(one[blind], other[blind])
    assert not torch.allclose(one[~blind], other[~blind])


@pytest.mark.parametrize("window", [0, 3, 100])
def test_a_window_is_that_part_of_the_whole(model: Path, window: int) -> None:
    # One convolution above the windows, so that the cells around them are all that it sees.
    method, state = new_method(model, window=window, window_from=3, decoder_blocks=[1, 1, 1, 1, 0])
    latents = torch.randn(2, 4, 4, 4)
    whole = method.autoencoder.decode(latents / method.old.scale).sample
    for _ in range(5):
        part, (rows, columns) = method.decoded(latents, state)
        assert part.shape[-1] == (window * 2 if window == 3 else PX)
        torch.testing.assert_close(part, whole[:, :, rows, columns], rtol=1e-4, atol=1e-4)


def test_it_learns_and_nothing_else_moves(model: Path) -> None:
    method, state = new_method(model, student_share=0.5, adversarial_from=20, lr=5e-3)
    fixed = [method.old.autoencoder, method.student.unet, *method.text_encoder.towers]
    before = [weights(network) for network in fixed]
    judges = weights(method.discriminator)
    update, told = Update(state, LoopOptions(warmup=0)), batch(8)
    rows = []
    for iteration in range(40):
        state.iteration = iteration
        rows.append(optimize(method.step, state, told, update, nullcontext))
        if iteration == 19:
            assert all(torch.equal(a, b) for a, b in zip(judges, weights(method.discriminator), strict=True))
    assert not update.bad
    assert "discriminator" in rows[-1]
    assert "discriminator" not in rows[0]
    for name in ("kept", "l1"):
        first, last = (sum(row[name].item() for row in some) for some in (rows[:5], rows[-5:]))
        assert last < 0.8 * first
    for network, value in zip(fixed, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(value, weights(network), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(judges, weights(method.discriminator), strict=True))


def test_what_is_exported_decodes_the_same_latents_at_twice_the_side(model: Path, tmp_path: Path) -> None:
    method, state = new_method(model)
    optimize(method.step, state, batch(), Update(state, LoopOptions()), nullcontext)
    pictures, names = method.sheet(state)
    assert pictures.shape == (9, PX, PX, 3)
    assert names[-1] == "a red star"
    method.export(state, tmp_path)
    saved: Any = AutoencoderTiny.from_pretrained(tmp_path / "vae")
    assert saved.config.scaling_factor == LatentSpace.load(model / "vae").scale
    assert saved.decode(torch.zeros(1, 4, 4, 4)).sample.shape == (1, 3, PX, PX)
    assert saved.encode(torch.zeros(1, 3, PX, PX)).latents.shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"decoder_blocks": [1, 1, 1, 0]}, "need 5 numbers each"),
        ({"encoder_blocks": [0, 1, 1, 1]}, "as long as each other"),
        ({"window_from": 4}, "counts the decoder's sizes"),
    ],
)
def test_sizes_that_do_not_double_are_refused(model: Path, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        Method(options(model, **changed), LoopOptions())


def test_only_a_tiny_autoencoder_grows(model: Path, tmp_path: Path) -> None:
    tiny_kl().save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="grows from an AutoencoderTiny"):
        Method(options(model, autoencoder=str(tmp_path)), LoopOptions())
