"""`onestill bench`: how long a prompt takes to become a picture on this machine, part by part, against diffusers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestill.cli.console import note, note_device, print_json, stdout_console
from onestill.cli.options import CompileOptions, Json, Model, RuntimeOptions, Size, parse_size, with_groups
from onestill.errors import OnestillError, require

if TYPE_CHECKING:
    from onestill.bench.latency import MeasuringError
    from onestill.bench.setting import Setting


@with_groups
def bench(
    *,
    model: Model = "icons",
    random: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Draw with random weights at real size: sdxl or sd21. (default: --model)"),
    ] = None,
    runtime: RuntimeOptions,
    tiny_vae: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="A tiny decoder; with --random also the word random. (default: the model's VAE)"
        ),
    ] = None,
    compiling: CompileOptions,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="CPU threads to compute with. (default: each contender's choice)"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of sampling steps. (default: the model's)")
    ] = None,
    size: Size = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Number of images in one call. May be repeated. (default: 1)"),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, metavar="N", help="Number of calls that are timed.")] = 20,
    warm_up: Annotated[int, typer.Option(min=0, metavar="N", help="Number of calls before those that are timed.")] = 3,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The seed of the first picture.")] = 1,
    compare: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Also measure diffusers on the same weights. (default: onestill alone)"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Write a chart of the time of each part. (default: none)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the text encoder, the steps and the decoder; report medians, 95th percentiles, memory and the floor.

    Each contender loads and draws in a process of its own, with a new prompt for every picture. One that fails is left
    out, and its output goes to standard error; the others are reported.
    """
    if compare not in (None, "diffusers"):
        raise OnestillError(f"There is no '{compare}' to compare with; choose diffusers.")
    from onestill.bench.compare import measure_all, settings
    from onestill.bench.setting import Setting
    from onestill.engine.device import checked_name

    checked_name(runtime.device)
    height, width = parse_size(size)
    ours, weights = model_to_measure(model, random, runtime, tiny_vae)
    asked = Setting(
        contender="onestill",
        model=str(ours),
        **vars(runtime),
        threads=threads,
        tiny_vae=None if runtime.engine == "openvino" else weights.get("tiny_vae"),
        options=compiling.asked() or None,
        steps=steps,
        height=height,
        width=width,
        warm_up=warm_up,
        pictures=pictures,
        seed=seed,
    )
    if compare:
        asked = in_comparable_type(asked)
    contenders = settings(asked, batch or [1], weights if compare else None, compiled=compiling.compile is not None)
    results, failed = measure_all(contenders, note if sys.stderr.isatty() else lambda text: None)
    if results:
        note_device(runtime.device, results[0]["engine"], results[0]["device"])
    report = report_of(f"random-{random}" if random else model, random is not None, results, failed)
    if plot is not None and results:
        from onestill.bench.chart import bars

        plot.write_text(bars(results), encoding="utf-8")
    print_json(report) if as_json else show(report)
    for error in failed.values():
        raise error


def model_to_measure(
    model: str, random: str | None, runtime: RuntimeOptions, tiny_vae: str | None
) -> tuple[Path, dict[str, str]]:
    """The folder or file that our engine loads, and what diffusers loads: `model` and, if any, `tiny_vae`."""
    from onestill.checkpoint import resolve
    from onestill.export.random_models import cached_random_model, cached_random_openvino

    folder = resolve(model) if random is None else cached_random_model(random, note)
    tiny = str(folder / "tiny_vae") if random is not None and tiny_vae == "random" else tiny_vae
    weights = {"model": str(folder)} | ({"tiny_vae": tiny} if tiny else {})
    if random is None or runtime.engine != "openvino":
        return folder, weights
    openvino_weights = "int8" if runtime.dtype == "int8" else "float16"
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
    for heading in "contender batch encode denoise decode total p95 images/s load memory floor".split():
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
