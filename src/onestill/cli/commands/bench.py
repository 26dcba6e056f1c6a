"""`onestill bench`: how long words take to become a picture on this machine, part by part, against diffusers."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestill.cli.console import note, note_device, print_json, stdout_console
from onestill.cli.options import Compile, Device, Dtype, Engine, Json, Model, Quantize, parse_size
from onestill.errors import OnestillError, near, require

if TYPE_CHECKING:
    from onestill.bench.latency import MeasuringError, Setting

__all__ = ["bench"]

RANDOM = ("sdxl", "sd21")


def bench(
    model: Model = "icons",
    random: Annotated[
        str | None, typer.Option("--random", metavar="KIND", help="Random weights at real size: sdxl or sd21.")
    ] = None,
    engine: Engine = None,
    device: Device = None,
    dtype: Dtype = None,
    tiny_vae: Annotated[
        str | None,
        typer.Option("--tiny-vae", metavar="FOLDER", help="A tiny decoder; with --random, the word random is one."),
    ] = None,
    compiling: Compile = None,
    quantizing: Quantize = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, metavar="N", help="Sampling steps.")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="In pixels. (default: the model's)")] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, metavar="N", help="Images to a call. May be repeated.")
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=1, metavar="N", help="Calls that count.")] = 20,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, metavar="N", help="Calls before those.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the first picture.")] = 1,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="NAME", help="Also measure diffusers on the same weights.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw the parts as bars.")] = None,
    as_json: Json = False,
) -> None:
    """Time drawing: text encoder, steps, decoder; p50 and p95; images a second; memory; and the floor.

    Each contender loads and draws in a process of its own, with new words for every picture. One that fails is left
    out, with all that it said on standard error; the others are reported.
    """
    if compare not in (None, "diffusers"):
        raise OnestillError(f"There is no '{compare}' to compare with; the one there is: diffusers.")
    from onestill.bench.latency import Setting
    from onestill.bench.machine import machine
    from onestill.engine.device import checked_name

    checked_name(device)
    height, width = parse_size(size)
    at, weights = found_model(model, random, engine, tiny_vae, in_int8=dtype == "int8")
    options = {name: value for name, value in (("compile", compiling), ("quantize", quantizing)) if value is not None}
    asked = Setting(
        contender="onestill",
        model=str(at),
        engine=engine,
        device=device,
        dtype=dtype,
        threads=threads,
        tiny_vae=None if engine == "openvino" else weights.get("tiny_vae"),
        options=options or None,
        steps=steps,
        height=height,
        width=width,
        warm_up=warm_up,
        pictures=pictures,
        seed=seed,
    )
    if compare:
        asked = compared(asked)
    results, failed = measured_all(settings(asked, batch or [1], weights, compare is not None, compiling is not None))
    if results:
        note_device(device, results[0]["engine"], results[0]["device"])
    report = {
        "command": shlex.join(["onestill", *sys.argv[1:]]),
        "model": f"random-{random}" if random else model,
        "random_weights": random is not None,
        "machine": machine(),
        "results": results,
        "failed": {name: {"why": str(error), "stderr": error.stderr} for name, error in failed.items()},
        "times_faster_than_diffusers": ratios(results),
        "not_alike": not_alike(results),
    }
    if plot is not None and results:
        from onestill.bench.chart import bars

        plot.write_text(bars(results), encoding="utf-8")
    if as_json:
        print_json(report)
    else:
        show(report)
    for error in failed.values():
        raise error


def compared(asked: Setting) -> Setting:
    """What both contenders are asked for: on a GPU a type in which no part of either is cast."""
    require("diffusers", "torch")
    from onestill.bench.contenders import comparable

    both = comparable(asked)
    if both.dtype != asked.dtype:
        note(f"comparing in {both.dtype}, in which both compute every part alike")
    return both


def settings(
    asked: Setting, batches: list[int], weights: dict[str, str], compare: bool, compiling: bool
) -> list[Setting]:
    """Ours at each batch, and diffusers' beside it where it is compared with."""
    from onestill.bench.latency import with_contender

    found: list[Setting] = []
    for count in batches:
        ours = replace(asked, batch=count)
        found.append(ours)
        if compare:
            theirs = replace(with_contender(ours, "diffusers"), **dict[str, Any](weights))
            found += [theirs, replace(theirs, contender="diffusers compiled")] if compiling else [theirs]
    return found


def measured_all(settings: list[Setting]) -> tuple[list[dict[str, Any]], dict[str, MeasuringError]]:
    """The results of those that could be measured, and why the others could not."""
    from onestill.bench.latency import MeasuringError, measure_elsewhere

    results: list[dict[str, Any]] = []
    failed: dict[str, MeasuringError] = {}
    for setting in settings:
        name = f"{setting.contender}, batch {setting.batch}"
        if sys.stderr.isatty():
            note(f"measuring {name}")
        # Whoever ours is compared with runs where ours did, which was first.
        where = results[0]["device"] if results else setting.device
        try:
            results.append(with_floor(setting, measure_elsewhere(replace(setting, device=where))))
        except MeasuringError as error:
            failed[name] = error
            if len(error.stderr.splitlines()) > 1:  # one line is the sentence itself
                sys.stderr.write(f"{error.stderr.rstrip()}\n")
    return results, failed


def found_model(
    model: str, random: str | None, engine: str | None, tiny_vae: str | None, *, in_int8: bool = False
) -> tuple[Path, dict[str, str]]:
    """Where what we draw with lies; and the weights that diffusers draws with, made first where they are random."""
    from onestill.checkpoint import Additions, cache_folder, describe, resolve

    if random is None:
        folder = resolve(model)
        return folder, {"model": str(folder)} | ({"tiny_vae": tiny_vae} if tiny_vae else {})
    if random not in RANDOM:
        raise OnestillError(
            f"There is no random model '{random}'; choose from {', '.join(RANDOM)}.{near(random, RANDOM)}"
        )
    require("diffusers", "torch")
    from onestill.networks.random_weights import random_model

    folder = made(cache_folder() / "random" / random, lambda path: random_model(random, path))
    tiny = str(folder / "tiny_vae") if tiny_vae == "random" else tiny_vae
    weights = {"model": str(folder)} | ({"tiny_vae": tiny} if tiny else {})
    if engine != "openvino":
        return folder, weights
    from onestill.export.stored_weights import export_sd

    info = describe(folder, Additions(tiny_vae=Path(tiny) if tiny else None))
    kept = "int8" if in_int8 else "float16"
    form = cache_folder() / "random" / f"{random}-openvino-{kept}{'-tiny' if tiny else ''}"
    return made(form, lambda path: export_sd(info, path, weights=kept)), weights


def made(folder: Path, make: Any) -> Path:
    """The folder, made first where it is not there; it appears whole."""
    import tempfile

    if not folder.is_dir():
        note(f"making {folder}, once")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            make(Path(scratch) / "made").rename(folder)
    return folder


def with_floor(setting: Setting, result: dict[str, Any]) -> dict[str, Any]:
    """The result with its floor, where torch is there to count and to measure it."""
    if importlib.util.find_spec("torch") is None:
        return result
    from onestill.bench.roofline import floor
    from onestill.checkpoint import Additions, describe, resolve

    if setting.threads is not None:
        require("torch", "torch").set_num_threads(setting.threads)
    tiny = Additions(tiny_vae=Path(setting.tiny_vae) if setting.tiny_vae else None)
    info = describe(resolve(setting.model), tiny)
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


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """How many times faster ours is than each other contender at the same batch, by medians."""
    return {
        f"{theirs['contender']}, batch {theirs['batch']}": round(theirs["total_ms"]["p50"] / ours["total_ms"]["p50"], 2)
        for ours, theirs in pairs(results)
    }


def not_alike(results: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """By contender and batch, the parts that ours and it compute in different types, and in which.

    A ratio beside which one stands is of more than who draws: of int8 on a CPU, which diffusers does not have.
    """
    found = {}
    for ours, theirs in pairs(results):
        parts = {
            name: f"{dtype} and {theirs['dtypes'][name]}"
            for name, dtype in ours["dtypes"].items()
            if dtype != theirs["dtypes"][name]
        }
        if parts:
            found[f"{theirs['contender']}, batch {theirs['batch']}"] = parts
    return found


def pairs(results: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each other contender's result with ours of the same batch before it."""
    ours = {one["batch"]: one for one in results if one["contender"] == "onestill"}
    return [(ours[one["batch"]], one) for one in results if one["contender"] != "onestill" and one["batch"] in ours]


def show(report: dict[str, Any]) -> None:
    """One contender and batch a line."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in (
        "contender",
        "batch",
        "encode",
        "denoise",
        "decode",
        "total",
        "p95",
        "images/s",
        "load",
        "memory",
        "floor",
    ):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for one in report["results"]:
        parts = [f"{one[part]['p50']:.1f} ms" for part in ("encode_ms", "denoise_ms", "decode_ms", "total_ms")]
        table.add_row(
            f"{one['contender']} ({one['engine']}, {one['dtype']})",
            str(one["batch"]),
            *parts,
            f"{one['total_ms']['p95']:.1f} ms",
            f"{one['images_per_second']:.2f}",
            f"{one['load_ms'] / 1000:.1f} s",
            f"{one['peak_memory_mb']:.0f} MB",
            f"{one['floor_multiple']:.1f}x" if "floor_multiple" in one else "",
        )
    console = stdout_console()
    if report["random_weights"]:
        console.print("random weights: only the times mean anything")
    console.print(table)
    for name, ratio in report["times_faster_than_diffusers"].items():
        parts = report["not_alike"].get(name, {})
        other = "; ".join(f"{part} in {dtypes}" for part, dtypes in parts.items())
        console.print(f"{ratio:.2f} times faster than {name}" + (f" ({other})" if other else ""))
