"""What is changed in a model before it draws, and how it is compiled: by dynamo in full, but to no machine code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onestill.checkpoint import describe
from onestill.engine.protocol import TorchOptions
from onestill.engine.torch.compiling import fuse, prepared
from onestill.networks.inference import Networks
from onestill.networks.load import load_components
from onestill.pipeline import Pipeline
from tests.on_cpu import load
from tests.tiny_sd import FAMILIES, tiny_sd, tiny_unet


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "xl", "sdxl")


# --- before it draws ---


@pytest.mark.parametrize("family", FAMILIES)
def test_fusing_moves_weights_and_changes_nothing(family: str) -> None:
    torch.manual_seed(0)
    unet = tiny_unet(family).eval()
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 77, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(2, 64), "time_ids": torch.full((2, 6), 64.0)} if family == "sdxl" else None
    with torch.inference_mode():
        expected = unet(x, 999, states, added_cond_kwargs=added, return_dict=False)[0]
        before = sum(parameter.numel() for parameter in unet.parameters())
        fuse(unet)
        found = unet(x, 999, states, added_cond_kwargs=added, return_dict=False)[0]
    assert sum(parameter.numel() for parameter in unet.parameters()) == before
    names = [name for name, _ in unet.named_parameters()]
    assert any("to_qkv" in name for name in names)
    assert any("to_kv" in name for name in names)
    assert not any(".to_k." in name or ".to_v." in name for name in names)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (TorchOptions(), False),
        (TorchOptions(compile="regional"), False),
        (TorchOptions(compile="whole"), True),
        (TorchOptions(channels_last=True), True),
        (TorchOptions(compile="whole", channels_last=False), False),
    ],
    ids=str,
)
def test_a_gpu_has_channels_last_where_all_is_compiled(xl: Path, options: TorchOptions, expected: bool) -> None:
    info = describe(xl)
    networks = Networks(info, load_components(info))
    prepared(networks, options, on_gpu=True)
    for weight in (networks.unet.conv_in.weight, networks.latent_space.decoder.decoder.conv_in.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last) == expected


def test_cudnn_measures_while_it_draws_and_not_after(xl: Path) -> None:
    seen: list[bool] = []
    for wanted in (True, False):
        pipe = load(xl, engine="torch", options=TorchOptions(cudnn_benchmark=wanted))
        engine: Any = pipe.engine
        for module in (engine._networks.unet.conv_in, engine._networks.latent_space.decoder.decoder.conv_in):
            module.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
        pipe("a red apple", seed=1)
        assert not torch.backends.cudnn.benchmark
    assert seen == [True, True, False, False]


# --- compiling ---


class Compiled:
    """A backend of torch.compile that remembers what it is given to compile, and runs it as it is."""

    def __init__(self) -> None:
        self.shapes: list[list[tuple[Any, ...]]] = []  # of the inputs of each thing compiled, weights aside

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        del options
        self.shapes.append(
            [
                tuple(one.shape) if isinstance(one, Tensor) else (one,)
                for one in inputs
                if not isinstance(one, nn.Parameter)
            ]
        )
        return module.forward


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    backend = Compiled()
    monkeypatch.setattr("onestill.engine.torch.compiling.BACKEND", backend)
    torch._dynamo.reset()
    yield backend
    torch._dynamo.reset()


def drawn(pipe: Pipeline, *sizes: int, count: int = 1) -> Any:
    """Pictures of each size, made by a thread of their own."""
    found: list[Any] = []

    def draw() -> None:
        for size in sizes:
            images = pipe("a red apple", seed=1, num_images_per_prompt=count, height=size, width=64).images
            found.append(np.stack([np.asarray(image, dtype=np.int16) for image in images]))

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert len(found) == len(sizes), "the thread failed; its error is above"
    return found


KINDS = ["regional", pytest.param("whole", marks=pytest.mark.slow)]


@pytest.mark.slow
def test_one_thread_warms_up_and_another_draws_more_than_eight_shapes(xl: Path, compiles: Compiled) -> None:
    pipe, slow = load(xl, engine="torch", options=TorchOptions(compile="regional")), load(xl, engine="torch")
    drawn(pipe, 64)
    first = len(compiles.shapes)
    assert first > 0
    sizes = [64 + 16 * i for i in range(1, 10)]
    for found, expected in zip(drawn(pipe, *sizes), drawn(slow, *sizes), strict=True):
        assert np.abs(found - expected).max() <= 1
    assert len(compiles.shapes) == first * (1 + len(sizes)), "each shape is compiled"


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_number_of_images_is_compiled_for_itself(xl: Path, compiles: Compiled, kind: str) -> None:
    pipe = load(xl, engine="torch", options=TorchOptions(compile=kind))
    for count in (1, 2, 4):
        drawn(pipe, 64, count=count)
    shapes = [shape for shapes in compiles.shapes for shape in shapes if shape]
    assert {type(number) for shape in shapes for number in shape} == {int}, "a symbolic shape"
    assert {1, 2, 4} <= {shape[0] for shape in shapes}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regional", "whole"])
def test_more_shapes_than_are_compiled_are_drawn_all_the_same(
    xl: Path, compiles: Compiled, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onestill.engine.torch.compiling.MOST_COMPILED", 3)
    pipe, slow = load(xl, engine="torch", options=TorchOptions(compile=kind)), load(xl, engine="torch")
    sizes = (64, 80, 96, 112, 128, 64)
    for found, expected in zip(drawn(pipe, *sizes), drawn(slow, *sizes), strict=True):
        assert np.abs(found - expected).max() <= 1
    count = len(compiles.shapes)
    drawn(pipe, 144, 64)
    assert len(compiles.shapes) == count
