"""`onestill models`: what can be drawn with, and what a model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestill.cli.console import print_json, stdout_console
from onestill.cli.options import Json, Preset

if TYPE_CHECKING:
    from onestill.checkpoint import FileInfo, ModelInfo


def models(
    model: Annotated[
        str | None,
        typer.Argument(metavar="NAME|PATH|ID", help="The model to describe in full. (default: list the shipped ones)"),
    ] = None,
    preset: Preset = None,
    check: Annotated[bool, typer.Option("--check", help="Compare every file with its recorded SHA-256.")] = False,
    as_json: Json = False,
) -> None:
    """List the shipped models, or say what a name, folder, file or Hub id is."""
    from onestill.checkpoint import Additions, describe, list_models, resolve, verify

    if model is not None and (part := part_of_a_model(model)) is not None:
        print_json({"models": [part]}) if as_json else print_facts(part)
        return
    names = [model] if model is not None else list_models()
    infos = [describe(resolve(name), Additions(preset=preset)) for name in names]
    if check:
        for info in infos:
            verify(info.path, contents=True, use_stamps=False)
    if as_json:
        print_json({"models": [facts(info) for info in infos]})
    elif model is not None:
        print_facts(facts(infos[0]))
    else:
        print_table(infos)


def part_of_a_model(name: str) -> dict[str, object] | None:
    """What a safetensors file is that is no whole model, such as a LoRA; None for anything else."""
    from onestill.checkpoint import identify

    path = Path(name)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    found = identify(path)
    if found.kind == "checkpoint":
        return None
    return {
        "name": path.stem,
        "path": name,
        "kind": found.kind,
        "family": found.family or "unknown",
        **counted(found),
    }


def counted(found: FileInfo) -> dict[str, object]:
    """What a safetensors file holds, in numbers, and what its maker wrote into it."""
    return {
        "tensors": found.tensors,
        "parameters": found.parameters,
        "dtypes": dict(found.dtypes),
        "notes": dict(found.notes),
    }


def facts(info: ModelInfo) -> dict[str, object]:
    """The facts about a model, in values that JSON can hold."""
    from onestill.checkpoint import identify
    from onestill.checkpoint.files import NETWORKS

    return {
        "name": info.name,
        "path": str(info.path),
        "family": info.family,
        "width": info.width,
        "height": info.height,
        "num_inference_steps": info.num_inference_steps,
        "sampler": info.sampler,
        "preset": info.preset,
        "guidance_scale": info.guidance_scale,
        "prediction_type": info.schedule.prediction_type,
        "timestep_spacing": info.scheduler.get("timestep_spacing", info.schedule.timestep_spacing),
        "latent_shape": list(info.latent_shape),
        "max_tokens": info.max_tokens,
        "licence": info.licence,
        "styles": list(info.styles),
        "version": info.version,
        "made": info.made,
        "networks": {name: kind for name, (_, kind) in info.classes.items() if name in NETWORKS},
        **(counted(identify(info.path)) if info.path.is_file() else {}),
    }


def print_facts(values: dict[str, object]) -> None:
    """One fact a line, names in a column."""
    console = stdout_console()
    for name, value in values.items():
        console.print(f"[bold]{name:<20}[/]", end="")
        console.print(str(value), markup=False)


def print_table(infos: list[ModelInfo]) -> None:
    """One model a line."""
    if not infos:
        print("no model is installed")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "draws", "steps", "version", "licence", "folder"):
        table.add_column(heading, overflow="fold")
    for info in infos:
        size = f"{info.width}x{info.height}"
        table.add_row(info.name, size, str(info.num_inference_steps), info.version, info.licence, str(info.path))
    stdout_console().print(table)
