"""The least time a picture could take: its operations over the rate at which this device multiplies matrices.

A measured time over this floor says how much is lost to everything else, and is honest across machines. Reading the
weights from memory, which bounds small batches on large GPUs, is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from onestill.checkpoint import ModelInfo, read_json
from onestill.engine.device import synchronize
from onestill.errors import require

SIDES = {"cpu": 1536, "cuda": 8192}  # of the matrices that are multiplied
OTHER_SIDE = 4096  # on other GPUs
TRIES = 8


def floor(
    info: ModelInfo, *, batch: int, height: int, width: int, steps: int, device: str, dtype: str
) -> dict[str, Any]:
    """What one call must compute, and how long that takes at the rate that matrices are multiplied at.

    Returns:
        `gflop` for each part, `tflops`, and `floor_ms`.

    Raises:
        MissingExtraError: torch is not installed.
    """
    gflop = count_gflop(info, batch=batch, height=height, width=width)
    gflop["unet"] *= steps
    rate = matrix_tflops(device, dtype)
    return {
        "gflop": {part: round(count, 1) for part, count in gflop.items()},
        "tflops": round(rate, 3),
        "floor_ms": round(sum(gflop.values()) / rate, 3),
    }


def count_gflop(info: ModelInfo, *, batch: int, height: int, width: int) -> dict[str, float]:
    """Billions of operations, a multiplication and an addition as two, of one call of each part."""
    torch = require("torch", "torch")
    from torch.utils.flop_counter import FlopCounterMode

    from onestill.networks.inference import Networks
    from onestill.networks.random_weights import meta_module

    parts = {name: meta_module(kind, config) for name, (kind, config) in _configs(info).items()}
    networks = Networks(info, parts)
    factor = info.vae_scale_factor
    with torch.device("meta"), torch.no_grad():
        ids = [torch.zeros(batch, info.max_tokens, dtype=torch.long) for _ in networks.text_encoder.towers]
        latents = torch.zeros(batch, info.latent_shape[0], height // factor, width // factor)
        states, pooled = networks.text_encoder.states(ids)
        time_ids = torch.zeros(batch, 6) if info.is_xl else None
        # Timestep embeddings make their table from a number, which a meta tensor does not have; it counts for nothing.
        timestep = torch.zeros(1)

        def count(function: Callable[[], Any]) -> float:
            with FlopCounterMode(display=False) as counter:
                function()
            return float(counter.get_total_flops()) / 1e9

        return {
            "text": count(lambda: networks.text_encoder.states(ids)),
            "unet": count(lambda: networks.output(latents, timestep, states, pooled, time_ids)),
            "decoder": count(lambda: networks.latent_space.decode(latents)),
        }


def _configs(info: ModelInfo) -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in (*info.text_encoders, "unet", "vae", "tiny_vae"):
        if network := info.component_files.get(name):
            found[name] = (network.kind, dict(network.config))
        elif name in info.classes:
            found[name] = (info.classes[name][1], read_json(info.path, f"{name}/config.json"))
        elif name == "tiny_vae" and (info.path / "openvino").is_dir() and (info.path / name).is_dir():
            found[name] = ("AutoencoderTiny", read_json(info.path, f"{name}/config.json"))  # part of what was exported
    return found


def matrix_tflops(device: str, dtype: str) -> float:
    """Trillions of operations a second in the best of some products of large matrices."""
    torch = require("torch", "torch")
    side = SIDES.get(torch.device(device).type, OTHER_SIDE)
    kind = getattr(torch, dtype)
    if dtype == "int8":
        a, b = (torch.randint(-127, 128, (side, side), device=device, dtype=kind) for _ in range(2))
        multiply = torch._int_mm  # what torch's own quantised layers call
    else:
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        multiply = torch.matmul
    best = float("inf")
    for _ in range(TRIES):
        started = time.perf_counter()
        multiply(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return float(2 * side**3 / best / 1e12)
