"""`onestill train`: run one recipe. Wires the reader of shards to the loop, as neither knows the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestill.cli.console import SIGNALLED, note
from onestill.errors import RecipeError, require

if TYPE_CHECKING:
    from onestill.data.recipe_reader import RecipeReader
    from onestill.train.recipe import DataOptions

MOST_NAMED = 10  # of the samples that could not be used


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe: what to train, and how.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting of the recipe, such as loop.seed=1. May be repeated."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the recipe and what it costs, and stop.")
    ] = False,
    devices: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Number of devices that a dry run plans for; 0 is as many as there are processes."
        ),
    ] = 0,
) -> None:
    """Train one stage of a model as its recipe says. Ctrl-C, SIGTERM and SIGHUP save a checkpoint first.

    Started by torchrun or accelerate, its processes train together.
    """
    if not recipe.is_file():
        raise RecipeError(f"There is no recipe '{recipe}'; give a TOML file, such as one from recipes/icons.")
    for package in ("torch", "accelerate", "tensorboard"):
        require(package, "train")
    from onestill.data.recipe_reader import RecipeReader
    from onestill.train.run import train_recipe
    from onestill.train.runtime.interrupt import Interrupted

    readers: list[RecipeReader] = []

    def reader(options: DataOptions, part: tuple[int, int]) -> RecipeReader:
        readers.append(RecipeReader(options, part))
        return readers[-1]

    try:
        train_recipe(recipe, overrides or [], reader=reader, resume=resume, dry_run=dry_run, devices=devices)
    except Interrupted as stop:
        if stop.iteration:
            note(f"saved at iteration {stop.iteration}: --resume continues from there.")
        raise typer.Exit(SIGNALLED + stop.signum) from None
    for one in readers:
        left_out = dict(one.shards.skipped)  # a copy, as its thread still reads ahead
        for name, why in list(left_out.items())[:MOST_NAMED]:
            note(f"left out {name}: {why}")
        if len(left_out) > MOST_NAMED:
            note(f"and {len(left_out) - MOST_NAMED} more: 'onestill data count' names all of them.")
