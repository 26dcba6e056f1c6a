"""`onestill evaluate`: models on the same captions and seeds, in one report. Wires shards, pipelines and a network."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onestill.cli.console import announced, note_device, print_json, progress
from onestill.cli.options import Json, RuntimeOptions, with_groups
from onestill.errors import DataError, require

if TYPE_CHECKING:
    from onestill.data import Sample
    from onestill.evaluate import Evaluation
    from onestill.evaluate.protocol import Pictures
    from onestill.pipeline import Pipeline

BATCH = 16
SHOWN = 24  # prompts on the sheet side by side
CAVEATS = ("Figures of one network; compare them only within one report.",)


@with_groups
def evaluate(
    *,
    reference: Annotated[
        list[str],
        typer.Option(metavar="SHARD|FOLDER", help="Real pictures; their captions are the prompts. May be repeated."),
    ],
    network: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="The contrastive model that measures, best one that no contender was trained against.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder for the report, made if need be.")
    ],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", metavar="NAME|FOLDER", help="A model to evaluate. May be repeated. (default: icons)"
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Number of sampling steps. May be repeated. (default: the model's)"),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(metavar="X", help="The guidance scale of all models. (default: each model's own)")
    ] = None,
    text_model: Annotated[
        str, typer.Option(metavar="NAME|FOLDER", help="The model whose text encoder the network was trained with.")
    ] = "icons",
    number: Annotated[int, typer.Option(min=2, metavar="N", help="Number of prompts at most.")] = 2000,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Chooses the prompts, and is the first one's seed.")
    ] = 0,
    runtime: RuntimeOptions,
    as_json: Json = False,
) -> None:
    """Draw the captions of real pictures with every model, measure, and write a report.

    What was drawn is saved in the folder: run the same command again to continue after an interruption.
    """
    for package in ("torch", "transformers"):
        require(package, "evaluate")
    from onestill.engine.device import choose
    from onestill.evaluate import Protocol, load_network, pipeline_contender
    from onestill.evaluate import evaluate as run
    from onestill.pipeline import load

    asked = models or ["icons"]
    pipes = [load(model, **vars(runtime)) for model in asked]
    contenders = [
        pipeline_contender(pipe, name, count, pipe.info.guidance_scale if guidance_scale is None else guidance_scale)
        for pipe, name in zip(pipes, names_of(asked, pipes), strict=True)
        for count in steps or [pipe.info.num_inference_steps]
    ]
    samples = read_reference(reference, number, seed, pipes[0])
    protocol = Protocol(
        prompts=tuple(sample.caption for sample in samples),
        seeds=tuple(range(seed, seed + len(samples))),
        sheets={"side by side": tuple(range(0, len(samples), max(1, len(samples) // SHOWN)))[:SHOWN]},
        batch_size=BATCH,
    )
    where = choose(runtime.device)
    net = load_network(network, text_model, device=where)
    # Said when the first is read: by then names and networks were found right, and a mistake stays one line.
    reals = announced(in_batches(samples), lambda: note_device(runtime.device, "torch", where))
    done = 0
    with progress("evaluating", len(contenders) * protocol.num_pictures) as advance:

        def advance_by(name: str, drawn: int, total: int) -> None:
            nonlocal done
            advance(max(0, drawn - done))
            done = drawn if drawn < total else 0

        result = run(contenders, protocol, reals, [net], out / "material", progress=advance_by)
    page = report(result, out, len(samples), seed)
    if as_json:
        print_json({"report": str(page), "facts": str(out / "report.json")})
    else:
        print(page)


def names_of(asked: Sequence[str], pipes: Sequence[Pipeline]) -> list[str]:
    """How a report calls each model: by its own name, or as it was asked for where several have the same one."""
    count = Counter(pipe.info.name for pipe in pipes)
    return [pipe.info.name if count[pipe.info.name] == 1 else one for one, pipe in zip(asked, pipes, strict=True)]


def read_reference(sources: list[str], number: int, seed: int, pipe: Pipeline) -> list[Sample]:
    """At most `number` samples of the size that the model draws, two at least, chosen by `seed`."""
    size = (pipe.info.height, pipe.info.width)
    from onestill.data import ShardReader

    reader = ShardReader(sources, seed=seed, shuffle=True, epochs=1, size=size)
    samples = list(itertools.islice(reader, number))
    if len(samples) < 2:
        raise DataError(
            f"The reference has {len(samples)} usable pictures of {size[1]}x{size[0]}; it needs two or more."
        )
    return samples


def in_batches(samples: Sequence[Sample]) -> Iterator[Pictures]:
    """The samples' pictures, uint8 [B, H, W, 3], in order."""
    import numpy as np

    for start in range(0, len(samples), BATCH):
        yield np.stack([sample.image for sample in samples[start : start + BATCH]])


def report(result: Evaluation, out: Path, number: int, seed: int) -> Path:
    """Write the page and its JSON, and return the page."""
    from onestill.bench.machine import machine_for_report, versions
    from onestill.evaluate.report.model import About, Report
    from onestill.evaluate.report.page import write_report
    from onestill.evaluate.report.sheets import failures, side_by_side

    last = result.results[-1].name
    about = About(
        title="onestill evaluation",
        lead=f"{len(result.results)} contenders, {number} captions of real pictures, one picture each.",
        sets={
            "prompts": f"{number} captions of the reference",
            "reference": f"the {number} pictures of those captions",
        },
        command=shlex.join(["onestill", *sys.argv[1:]]),
        seed=seed,
        machine=machine_for_report(),
        versions=versions(),
        caveats=CAVEATS,
    )
    sheets = {
        "side": side_by_side(
            result, "side by side", "Side by side", "Evenly spaced prompts; nothing was picked by hand."
        ),
        "failures": failures(result, last, f"Failures of {last}", "The pictures with the lowest CLIP scores."),
    }
    return write_report(Report(about, result, sheets=sheets, hero=last), out)
