"""What becomes CUDA graphs, run on a pretended GPU that refuses what a graph cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from onestill.checkpoint import ModelInfo, describe
from onestill.engine.protocol import TorchOptions
from onestill.engine.torch.compiling import prepared
from onestill.engine.torch.eager import TorchEngine
from onestill.engine.torch.fast import BATCHES
from onestill.engine.torch.stages import decode_latents, encode_prompts, take_steps
from onestill.engine.torch.step_table import SETTINGS, step_table
from onestill.networks.inference import Networks
from onestill.sampling import strength_timesteps
from tests.engine.pretended_gpu import Recording, Unrecordable, moved, pretended_gpu, put, taken
from tests.tiny import tiny_autoencoder, tiny_model
from tests.tiny_sd import FAMILIES, tiny_sd

WALKS: dict[str, dict[str, Any]] = {
    "one step": {"steps": 1},
    "three steps": {"steps": 3},
    "guided": {"steps": 1, "guides": True},
    "from an image": {"steps": 3, "strength": 0.7, "sampler": "euler_ancestral"},
    "inside a mask": {"steps": 3, "strength": 0.7, "guides": True, "mask": True},
}


class Pretended(NamedTuple):
    info: ModelInfo
    networks: Networks
    states: tuple[int, ...]  # the shape of a prompt's
    pooled: tuple[int, ...] | None


@pytest.fixture(scope="module", params=[*FAMILIES, "icons"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pretended:
    """A model as the engine has it on a GPU, with weights that are only pretended."""
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "icons":
        tiny_model(folder, openvino=False)
    else:
        tiny_sd(folder, request.param)
    engine = TorchEngine(describe(folder), device="cpu", dtype="float16")
    found = engine.encode(["a red apple"])
    networks = engine._networks
    prepared(networks, TorchOptions(), on_gpu=True)
    with pytest.MonkeyPatch.context() as patch, pretended_gpu(patch):
        for module in (networks.unet, networks.latent_space.autoencoder, *networks.text_encoder.towers):
            moved(module)
    pooled = None if found.pooled is None else found.pooled.shape[1:]
    return Pretended(engine.info, networks, found.states.shape[1:], pooled)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("size", [BATCHES[0], BATCHES[-1]])
def test_prompts_are_encoded_on_the_device_alone(model: Pretended, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    info = model.info
    with pretended_gpu(monkeypatch):
        ids = random(size, info.max_tokens, dtype=torch.int64)
        second = ids if info.is_xl else None
        mask = torch.ones_like(ids) if info.use_attention_mask else None
        with Recording():
            states, pooled = encode_prompts(model.networks, ids, second, mask)
    assert states.is_cuda
    assert states.shape == (size, *model.states)
    assert (pooled is None) == (model.pooled is None)


@pytest.mark.parametrize("size", [BATCHES[0], BATCHES[-1]])
@pytest.mark.parametrize("walk", WALKS)
def test_steps_are_taken_on_the_device_alone(
    model: Pretended, walk: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, settings = model.info, WALKS[walk]
    timesteps = info.timesteps(settings["steps"])
    if has_start := "strength" in settings:
        timesteps = strength_timesteps(timesteps, settings["strength"])
    sampler = settings.get("sampler", info.sampler)
    noises = len(timesteps) if sampler in ("consistency", "euler_ancestral") else 1
    numbers = step_table(info, sampler, tuple(timesteps), noises, has_start)
    rows = 2 * size if settings.get("guides") else size
    with pretended_gpu(monkeypatch):
        dtype = model.networks.dtype
        inputs = (
            random(*numbers.shape),
            random(),
            random(noises, size, *info.latent_shape),
            random(1, *info.latent_shape) if has_start else None,
            random(rows, *model.states, dtype=dtype),
            None if model.pooled is None else random(rows, *model.pooled, dtype=dtype),
            random(rows, 6) if info.is_xl else None,
            random(1, 1, *info.latent_shape[1:]) if settings.get("mask") else None,
        )
        with Recording():
            latents = take_steps(model.networks, model.networks.output, *inputs)
    assert latents.is_cuda
    assert (latents.shape, latents.dtype) == ((size, *info.latent_shape), torch.float32)


@pytest.mark.parametrize("size", [BATCHES[0], BATCHES[-1]])
def test_latents_are_decoded_on_the_device_alone(model: Pretended, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch):
        latents = random(size, *model.info.latent_shape)
        with Recording():
            pictures, is_whole = decode_latents(model.networks, latents)
    assert (pictures.shape, pictures.dtype) == ((size, model.info.height, model.info.width, 3), torch.uint8)
    assert is_whole.is_cuda
    assert is_whole.shape == ()


def test_a_tiny_decoder_is_captured_too(model: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch):
        parts = {
            "unet": model.networks.unet,
            "vae": model.networks.latent_space.autoencoder,
            "tiny_vae": moved(tiny_autoencoder()),
        }
        latents = random(1, *model.info.latent_shape)
        with Recording():
            pictures, is_whole = decode_latents(Networks(model.info, parts), latents)
    assert pictures.is_cuda
    assert is_whole.is_cuda


def test_a_network_that_embeds_guidance_is_given_it_on_the_device(
    model: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(model.networks.unet.config) | {"time_cond_proj_dim": 32}
    unet = type(model.networks.unet).from_config(config).half()
    assert unet.config.time_cond_proj_dim == 32
    info, dtype = model.info, torch.float16
    with pretended_gpu(monkeypatch):
        networks = Networks(info, {"unet": moved(unet), "vae": model.networks.latent_space.autoencoder})
        inputs = (
            random(1, SETTINGS + 2),
            random(),
            random(1, 1, *info.latent_shape),
            None,
            random(1, *model.states, dtype=dtype),
            None if model.pooled is None else random(1, *model.pooled, dtype=dtype),
            random(1, 6) if info.is_xl else None,
        )
        with Recording():
            assert take_steps(networks, networks.output, *inputs).is_cuda


# --- what is refused ---

FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "a branch": lambda x: x if x.sum() > 0 else -x,
    "a branch on all": lambda x: x if (x > 0).all() else -x,
    "a list": lambda x: x.tolist(),
    "a comparison": lambda x: torch.equal(x, x),
    "a copy to the CPU": lambda x: x.cpu(),
    "a copy into the CPU": lambda x: torch.zeros(3).copy_(x),
    "a copy from the CPU": lambda x: x + torch.ones(3).to("cuda"),
    "a number from the CPU": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="cuda"),
    "a tensor on the CPU": lambda x: x * torch.ones(()),
    "a constant on the CPU": lambda x: x * torch.tensor(2.0),
    "a table on the CPU": lambda x: torch.arange(3).float() * 2,
    "a condition as index": lambda x: x[x > 0],
    "a condition as place": lambda x: put(x, x > 0, x),
    "a list as index": lambda x: x[[0, 1]],
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats by number": lambda x: torch.repeat_interleave(x, torch.ones_like(x, dtype=torch.int64)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_graph_cannot_hold_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch):
        x = random(3)
        with Recording(), pytest.raises(Unrecordable):
            FAULTS[fault](x)


def test_what_a_graph_holds_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch):
        x = random(3)
        with Recording():
            x[1:] = x[0] * 2 + torch.full((2,), 3.0, device="cuda")
            found = torch.where(x > 0, x[torch.arange(3, device="cuda")], 0.0).masked_fill(x > 1, 1.0).half()
    assert found.is_cuda


def test_a_fault_in_a_network_is_found(model: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    def reads_back(latents: Tensor) -> Tensor:
        return latents / latents.abs().max().item()

    space = model.networks.latent_space
    decode = space.decode
    monkeypatch.setattr(space, "decode", lambda latents: decode(reads_back(latents)))
    with pretended_gpu(monkeypatch):
        latents = random(1, *model.info.latent_shape)
        with Recording(), pytest.raises(Unrecordable, match="reads numbers back"):
            decode_latents(model.networks, latents)


def test_indexing_is_torchs_own() -> None:
    x = torch.arange(120.0).view(2, 3, 4, 5)
    numbers, condition = torch.tensor([1, 0]), torch.tensor([True, False, True])
    for index in (
        *(0, -1, ..., slice(None), None, numbers, [1, 0], condition[:2]),
        *((slice(None), 1), (..., 1), (0, slice(1, 3), ..., 2), (None, 0), (slice(None), None, 1, ...)),
        *((slice(None), numbers), (0, numbers, slice(1, 2)), (numbers, numbers), (..., numbers)),
        *((slice(None), condition), (slice(None, None, 2), condition, 0)),
    ):
        assert torch.equal(taken(x, index), x[index]), index
        ours, theirs = x.clone(), x.clone()
        put(ours, index, 7.0)
        theirs[index] = 7.0
        assert torch.equal(ours, theirs), index
