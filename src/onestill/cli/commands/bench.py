"""`onestill bench`: how long words take to become a picture on this machine, part by part, against diffusers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestill.cli.console import note, note_device, print_json, stdout_console
from onestill.cli.options import Compile, Device, Dtype, Engine, Json, Model, Quantize, parse_size
from onestill.errors import OnestillError, require

if TYPE_CHECKING:
    from onestill.bench.latency import MeasuringError
    from onestill.bench.setting import Setting

__all__ = ["bench"]


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
        raise OnestillError(f"There is no '{compare}' to compare with; choose diffusers.")
    from onestill.bench.compare import measure_all, settings
    from onestill.bench.setting import Setting
    from onestill.engine.device import checked_name

    checked_name(device)
    height, width = parse_size(size)
    ours, weights = model_to_measure(model, random, engine, tiny_vae, "int8" if dtype == "int8" else "float16")
    options = {name: value for name, value in (("compile", compiling), ("quantize", quantizing)) if value is not None}
    asked = Setting(
        contender="onestill",
        model=str(ours),
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
        asked = in_comparable_type(asked)
    contenders = settings(asked, batch or [1], weights if compare else None, compiled=compiling is not None)
    results, failed = measure_all(contenders, note if sys.stderr.isatty() else lambda text: None)
    if results:
        note_device(device, results[0]["engine"], results[0]["device"])
    report = report_of(f"random-{random}" if random else model, random is not None, results, failed)
    if plot is not None and results:
        from onestill.bench.chart import bars

        plot.write_text(bars(results), encoding="utf-8")
    print_json(report) if as_json else show(report)
    for error in failed.values():
        raise error


def model_to_measure(
    model: str, random: str | None, engine: str | None, tiny_vae: str | None, openvino_weights: str
) -> tuple[Path, dict[str, str]]:
    """The folder or file that our engine loads, and what diffusers loads: `model` and, if any, `tiny_vae`."""
    from onestill.checkpoint import resolve
    from onestill.export.random_models import cached_random_model, cached_random_openvino

    folder = resolve(model) if random is None else cached_random_model(random, note)
    tiny = str(folder / "tiny_vae") if random is not None and tiny_vae == "random" else tiny_vae
    weights = {"model": str(folder)} | ({"tiny_vae": tiny} if tiny else {})
    if random is None or engine != "openvino":
        return folder, weights
    return cached_random_openvino(random, tiny, openvino_weights, note), weights


def in_comparable_type(asked: Setting) -> Setting:
    """The setting in a type that ours and diffusers both compute every part in; on a GPU alone that can be another."""
    require("diffusers", "torch")
    from onestill.bench.contenders import comparable

    both = comparable(asked)
    if both.dtype != asked.dtype:
        note(f"comparing in {both.dtype}, the type in which both compute every part")
    return both


def report_of(
    model: str, random_weights: bool, results: list[dict[str, Any]], failed: dict[str, MeasuringError]
) -> dict[str, Any]:
    """All that was measured, and on what, as `--json` prints it."""
    from onestill.bench.compare import not_alike, ratios
    from onestill.bench.machine import machine

    return {
        "command": shlex.join(["onestill", *sys.argv[1:]]),
        "model": model,
        "random_weights": random_weights,
        "machine": machine(),
        "results": results,
        "failed": {name: {"why": str(error), "stderr": error.stderr} for name, error in failed.items()},
        "times_faster_than_diffusers": ratios(results),
        "not_alike": not_alike(results),
    }


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
