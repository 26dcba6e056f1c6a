"""What OpenVINO does not promise, and which of its versions have it.

The last release that every one of these was tried on is `NEWEST`. When a newer one is installed and this file passes,
raise it; when it fails, the module that it names has to change before the requirement in pyproject.toml does.
"""

from __future__ import annotations

from onestill.engine.openvino.runtime import shared_core

import openvino
import pytest
import torch
from openvino import opset13

from onestill.engine.openvino.private_api import UNCHAINED, can_unchain, fuse, keep_half_precision, trace
from onestill.networks.libraries import quiet_libraries

OLDEST, NEWEST = (2025, 1), (2026, 4)


def test_the_installed_version_is_one_of_those_that_have_it() -> None:
    found = tuple(int(part) for part in openvino.__version__.split(".")[:2])
    assert OLDEST <= found <= NEWEST, f"try what is here on OpenVINO {found}, then raise NEWEST"


def test_chains_of_operations_can_be_left_without_kernels() -> None:
    assert dict(UNCHAINED) == {"SNIPPETS_MODE": "DISABLE"}
    assert can_unchain(shared_core())


def test_an_option_that_there_is_not_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestill.engine.openvino.private_api.UNCHAINED", {"NO_SUCH_OPTION": "DISABLE"})
    assert not can_unchain(shared_core())


def test_a_module_in_half_precision_is_traced_and_computes_in_float32() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()).half()
    expected = module.float()(torch.ones(1, 8)).detach().numpy()
    module.half()
    keep_half_precision(module)
    with quiet_libraries(), torch.no_grad():
        model = trace(module, {"input": torch.ones(1, 8)})
    types = {node.get_element_type().get_type_name() for node in model.get_ops() if node.get_type_name() == "Constant"}
    assert "f16" in types, "the weights are not held twice"
    found = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([torch.ones(1, 8).numpy()])[0]
    assert found == pytest.approx(expected, abs=1e-3)


def test_operations_are_fused() -> None:
    x = opset13.parameter([1, 4], openvino.Type.f32, name="x")
    model = openvino.Model([opset13.multiply(x, opset13.sigmoid(x))], [x])
    fuse(model)
    assert "Swish" in {node.get_type_name() for node in model.get_ops()}
