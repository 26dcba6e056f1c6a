"""OpenVINO, without its model converter: that is half the time of its import, and reports the import over the network.

Every module of ours takes `openvino` from here, before it imports parts of it.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from onestill.errors import require

_CONVERTER = "openvino.tools.ovc"


def _import_without_converter() -> Any:
    if "openvino" in sys.modules or _CONVERTER in sys.modules:
        return require("openvino", "base")
    sys.modules[_CONVERTER] = None  # type: ignore[assignment] # makes an import of it fail at once
    try:
        openvino = require("openvino", "base")
    finally:
        del sys.modules[_CONVERTER]

    def later(name: str) -> Any:
        """Whoever shares this process finds `openvino.convert_model` where it always is."""
        if name != "convert_model":
            raise AttributeError(f"module 'openvino' has no attribute '{name}'")
        from openvino.tools.ovc import convert_model

        return convert_model

    vars(openvino)["__getattr__"] = later
    return openvino


openvino = _import_without_converter()
opset13 = openvino.opset13


@cache
def shared_core() -> Any:
    """OpenVINO's Core, one for the process, which is never closed.

    Its CPU plugin puts a stack for signals under the thread that loads it, and with the Core it goes back to the one
    before. Of several Cores that may be one that is gone, and the next signal that Python handles, such as Ctrl-C,
    kills the process without a word.
    """
    return openvino.Core()
