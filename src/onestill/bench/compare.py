"""A latency comparison: ours and diffusers' at each batch size, measured in turn; ratios, and what is not alike."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from onestill.bench.latency import MeasuringError, measure_elsewhere
from onestill.bench.setting import Setting, with_contender
from onestill.checkpoint import Additions, describe, resolve
from onestill.errors import require

Result = dict[str, Any]


def settings(
    ours: Setting, batches: list[int], diffusers_weights: dict[str, str] | None, *, compiled: bool
) -> list[Setting]:
    """Ours at each batch size, and diffusers beside it where it is compared with.

    Args:
        ours: at any batch size.
        batches: images to a call.
        diffusers_weights: `model` and, if there is one, `tiny_vae`: what diffusers draws with; None leaves it out.
        compiled: whether diffusers is measured a second time, compiled.
    """
    found: list[Setting] = []
    for count in batches:
        found.append(replace(ours, batch=count))
        if diffusers_weights is not None:
            theirs = replace(with_contender(found[-1], "diffusers"), **dict[str, Any](diffusers_weights))
            found += [theirs, replace(theirs, contender="diffusers compiled")] if compiled else [theirs]
    return found


def measure_all(
    settings: list[Setting], say: Callable[[str], object]
) -> tuple[list[Result], dict[str, MeasuringError]]:
    """Measure each contender in a process of its own.

    Returns:
        The results of those that could be measured, each with its floor where torch is installed; and, by contender
        and batch size, why the others could not. All that those wrote is on standard error.
    """
    results: list[Result] = []
    failed: dict[str, MeasuringError] = {}
    for setting in settings:
        name = f"{setting.contender}, batch {setting.batch}"
        say(f"measuring {name}")
        # The first is ours: diffusers runs on the device that it ran on.
        where = results[0]["device"] if results else setting.device
        try:
            results.append(_with_floor(setting, measure_elsewhere(replace(setting, device=where))))
        except MeasuringError as error:
            failed[name] = error
            if len(error.stderr.splitlines()) > 1:  # one line is the error's own sentence
                sys.stderr.write(f"{error.stderr.rstrip()}\n")
    return results, failed


def _with_floor(setting: Setting, result: Result) -> Result:
    if importlib.util.find_spec("torch") is None:
        return result
    from onestill.bench.roofline import floor

    if setting.threads is not None:
        require("torch", "torch").set_num_threads(setting.threads)
    info = describe(resolve(setting.model), Additions.of(tiny_vae=setting.tiny_vae))
    counted = floor(
        info,
        batch=setting.batch,
        height=setting.height or info.height,
        width=setting.width or info.width,
        steps=setting.steps or info.num_inference_steps,
        device=result["device"],
        dtype=result["dtype"],
    )
    return result | counted | {"floor_multiple": round(result["total_ms"]["p50"] / counted["floor_ms"], 2)}


def ratios(results: list[Result]) -> dict[str, float]:
    """How many times faster ours is than each other contender at the same batch size, by medians."""
    return {
        name: round(theirs["total_ms"]["p50"] / ours["total_ms"]["p50"], 2) for name, ours, theirs in _pairs(results)
    }


def not_alike(results: list[Result]) -> dict[str, dict[str, str]]:
    """By contender and batch size, the parts that ours and it compute in different types, and in which.

    Such a ratio compares more than the two programs: on a CPU, int8 with float32, as diffusers has no int8.
    """
    found = {}
    for name, ours, theirs in _pairs(results):
        parts = {
            part: f"{dtype} and {theirs['dtypes'][part]}"
            for part, dtype in ours["dtypes"].items()
            if dtype != theirs["dtypes"][part]
        }
        if parts:
            found[name] = parts
    return found


def _pairs(results: list[Result]) -> list[tuple[str, Result, Result]]:
    """Each other contender's name and batch size, our result at that batch size, and its own."""
    ours = {one["batch"]: one for one in results if one["contender"] == "onestill"}
    return [
        (f"{one['contender']}, batch {one['batch']}", ours[one["batch"]], one)
        for one in results
        if one["contender"] != "onestill" and one["batch"] in ours
    ]
