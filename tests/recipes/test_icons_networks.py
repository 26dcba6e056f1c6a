"""Pretrained networks out of their packages: nothing but arrays is made of a pickle, and every weight has its place."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from onestill.errors import DataError
from onestill.train.discriminator.cnn import EfficientNetLite0
from onestill.train.lpips import LPIPS, WIDTHS
from recipes.icons.networks import ArraysOnly, lite0_weights, lpips_weights


class Runs:
    """What a hostile pickle would do."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_a_pickle_that_would_run_something_is_not_opened() -> None:
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.system, which is no array"):
        ArraysOnly(io.BytesIO(pickle.dumps({"VGG16_0": Runs()}))).load()
    with pytest.raises(DataError, match="which is no array"):
        ArraysOnly(io.BytesIO(pickle.dumps({"VGG16_0": print}))).load()


def by_numpy_1(made: Any) -> bytes:
    """As the package was pickled, by a NumPy that kept its function elsewhere."""
    return pickle.dumps(made, 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.mark.parametrize("pickled", [by_numpy_1, pickle.dumps])
def test_arrays_are_read_as_they_were(pickled: Callable[[Any], bytes]) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [np.ones(2)]}
    read = ArraysOnly(io.BytesIO(pickled(arrays))).load()
    assert np.array_equal(read["a"], arrays["a"])
    assert np.array_equal(read["b"][0], arrays["b"][0])


def test_lpips_has_a_place_for_every_array_of_the_package() -> None:
    layers = [conv for conv in LPIPS().network.convolutions if isinstance(conv, torch.nn.Conv2d)]
    network = {
        f"Conv_{i}": {
            "kernel": np.random.rand(3, 3, conv.in_channels, conv.out_channels).astype(np.float32),
            "bias": np.random.rand(conv.out_channels).astype(np.float32),
        }
        for i, conv in enumerate(layers)
    }
    lines = {
        f"NetLinLayer_{k}": {"Conv_0": {"kernel": np.full((1, 1, w, 1), k, np.float32)}} for k, w in enumerate(WIDTHS)
    }
    state = lpips_weights(by_numpy_1({"VGG16_0": network, **lines}))
    lpips = LPIPS()
    lpips.load_state_dict(state)
    assert torch.equal(lpips.weights[3], torch.full((512,), 3.0))
    first = torch.from_numpy(network["Conv_0"]["kernel"])
    assert torch.equal(state["network.convolutions.0.weight"][5, 2], first[:, :, 2, 5])


def test_lite0_has_a_place_for_every_weight_of_the_package() -> None:
    torch.manual_seed(0)
    ours = EfficientNetLite0().state_dict()
    theirs, number = dict[str, torch.Tensor](), -1
    names = {
        "expand": ("_expand_conv", "_bn0"),
        "look": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    before = ""
    for name, value in ours.items():
        if name.startswith("stem"):
            theirs[name.replace("stem.conv", "_conv_stem").replace("stem.norm", "_bn0")] = value
            continue
        _, stage, block, part, kind, leaf = name.split(".")
        number += (stage, block) != tuple(before.split(".")) if before else 1
        before = f"{stage}.{block}"
        conv, norm = names[part]
        theirs[f"_blocks.{number}.{conv if kind == 'conv' else norm}.{leaf}"] = value
    theirs["_fc.bias"] = torch.zeros(1000)
    file = io.BytesIO()
    torch.save(theirs, file)
    found = lite0_weights(file.getvalue())
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], value) for name, value in ours.items())
