"""Every use of OpenVINO that its documentation does not promise. The tests say which versions have each of them.

OpenVINO is imported without its model converter by `onestill.engine.openvino.runtime`, so what `convert_model` does
with a torch module is done here by hand; the converter would report its use over the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

# OpenVINO writes a kernel for each chain of small operations as it loads a network: half of what loading takes. This
# option, an internal one, turns that off.
UNCHAINED: Mapping[str, str] = {"SNIPPETS_MODE": "DISABLE"}


def can_unchain(core: Any) -> bool:
    """Whether this OpenVINO has the option `UNCHAINED`."""
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin, which alone knows its options
    with suppress(RuntimeError):
        core.set_property("CPU", dict.fromkeys(UNCHAINED, "ENABLE"))  # what it is anyway
        return True
    return False


def trace(module: Any, examples: Mapping[str, Any]) -> Any:
    """A torch module as OpenVINO's model, traced with example inputs. Needs torch.

    The decoder of TorchScript is how `convert_model` hands a module to the frontend.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(module, example_input=dict(examples))  # must outlive the conversion
    return frontend.convert(frontend.load(decoder))


def keep_half_precision(module: Any) -> None:
    """Keep a torch module's linear layers in half precision while its graph computes in float32.

    Memory then holds the weights once. The module must be traced after this. Needs torch.
    """
    from openvino.frontend.pytorch import patch_model

    getattr(patch_model, "__make_16bit_traceable")(module)


def fuse(model: Any) -> None:
    """Make the fusions that `convert_model` makes, in place, without folding constants, which would copy weights."""
    from openvino._offline_transformations import apply_moc_transformations

    apply_moc_transformations(model, cf=False)
