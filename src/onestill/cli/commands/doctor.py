"""`onestill doctor`: what this machine has, and whether a picture comes out."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

import onestill
from onestill.cli.console import print_json, stdout_console
from onestill.cli.options import Json, Model
from onestill.errors import OnestillError

if TYPE_CHECKING:
    from onestill.engine.gpus import Gpus, TorchDevices

PROMPT = "a red apple"

Facts = dict[str, object]


def doctor(
    model: Model = "icons",
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Draw one picture and time it.")] = True,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read all of every shipped model, and of what is cached.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine has, check the model's files, draw one picture, and advise the owner of an unused GPU.

    Exits with 0 when everything works, else with 2. Advice is no problem.
    """
    from onestill.bench.machine import cpu, torch
    from onestill.checkpoint import list_models
    from onestill.engine.gpu_advice import advice
    from onestill.engine.gpus import find_gpus

    problems: list[str] = []
    gpus, sees = find_gpus(), seen_by_torch()

    def checked_part(part: Callable[[], Facts]) -> Facts:
        try:
            return part()
        except OnestillError as error:
            problems.append(str(error))
            return {"problem": str(error)}

    report: Facts = {
        "onestill": onestill.__version__,
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": packages(),
        "cpu": cpu(),
        "openvino": openvino(),
        "gpus": facts_of(gpus),
        "torch": None if sees is None else torch(sees),
        "cache": cache(),
        "model": checked_part(lambda: checked(model)),
    }
    if deep:
        models = {name: checked_part(partial(checked, name)) for name in list_models()}
        report["deep"] = models | checked_part(cached)
    if draw and not problems:
        report["picture"] = checked_part(lambda: drawn(model))
    report |= {"problems": problems, "advice": advice(sees, gpus, os.environ), "ok": not problems}
    if as_json:
        print_json(report)
    else:
        show(report)
    raise typer.Exit(2 if problems else 0)


def packages() -> Facts:
    """The version of every package that some part of onestill uses, None where it is not installed."""
    from onestill.bench.machine import PACKAGES, versions

    names = [name for names in PACKAGES.values() for name in names]
    installed = versions(names)
    return {name: installed.get(name) for name in names}


def openvino() -> Facts:
    """The devices OpenVINO sees, and what each computes fast."""
    from onestill.engine.openvino.runtime import shared_core

    core = shared_core()
    return {
        device: {
            "name": str(core.get_property(device, "FULL_DEVICE_NAME")).strip(),
            "fast": sorted(str(name) for name in core.get_property(device, "OPTIMIZATION_CAPABILITIES")),
        }
        for device in core.available_devices
    }


def seen_by_torch() -> TorchDevices | None:
    """What torch sees, None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    from onestill.engine.gpus import torch_devices

    return torch_devices()


def facts_of(gpus: Gpus) -> Facts:
    """The machine's GPUs as the report has them: without what is not there."""
    return {name: value for name, value in asdict(gpus).items() if value and name != "platform"}


def cache() -> Facts:
    """Where compiled models are kept, and how much is there."""
    from onestill.checkpoint import cache_folder

    folder = cache_folder()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "folder": str(folder),
        "mebibytes": round(size / 2**20, 1),
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK),
    }


def cached() -> Facts:
    """How much compiled code is cached, once all of it has been read and found right.

    Raises:
        OnestillError: some of it is damaged.
    """
    from onestill.engine.openvino.compile_cache import damaged

    count, wrong = damaged()
    if wrong:
        raise OnestillError(
            f"{len(wrong)} of {count} cached networks are damaged, such as '{wrong[0]}'; delete them, or draw with "
            "them, which compiles them again."
        )
    return {"cached": count}


def checked(model: str) -> Facts:
    """What the model is, once every one of its files has been read and found right."""
    from onestill.checkpoint import describe, resolve, verify

    folder = resolve(model)
    verify(folder, contents=True, use_stamps=False)
    info = describe(folder)
    return {
        "name": info.name,
        "folder": str(folder),
        "version": info.version,
        "licence": info.licence,
        "files": "right",
    }


def drawn(model: str) -> Facts:
    """Draw one picture twice: a first time, then the time that a second one takes."""
    started = time.perf_counter()
    from onestill.pipeline import load

    pipe = load(model)
    load_ms = (time.perf_counter() - started) * 1000
    first = pipe(PROMPT, seed=0)
    again = pipe(f"{PROMPT}, again", seed=1)
    width, height = first.images[0].size
    return {
        "engine": pipe.engine.name,
        "device": pipe.engine.device,
        "dtype": pipe.engine.dtype,
        "size": f"{width}x{height}",
        "load_ms": round(load_ms, 1),
        "first_ms": round(first.timings.total_ms, 1),
        "again_ms": round(again.timings.total_ms, 1),
    }


def show(report: Facts) -> None:
    """The report as a table: one part a row, then problems and advice."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for part, facts in report.items():
        if part in ("problems", "advice", "ok"):
            continue
        table.add_row(part, escape(as_text(facts)))
    console = stdout_console()
    console.print(table)
    for problem in report["problems"]:  # type: ignore[attr-defined]
        console.print(f"[red]problem:[/] {escape(problem)}")
    for sentence in report["advice"]:  # type: ignore[attr-defined]
        console.print(f"[yellow]advice:[/] {escape(sentence)}")
    if report["ok"]:
        console.print("[green]everything works[/]")


def as_text(facts: object) -> str:
    """Facts in one cell: `name value, name value`; what is not there is none."""
    if facts is None:
        return "none"
    if isinstance(facts, dict):
        return ", ".join(f"{name} {as_text(value)}" for name, value in facts.items()) or "none"
    if isinstance(facts, (list, tuple)):
        return " ".join(map(str, facts)) or "none"
    return str(facts)
