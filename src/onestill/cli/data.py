"""`onestill data`: what a set of shards holds, in numbers and in pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestill.cli.console import note, print_json, progress, stdout_console
from onestill.cli.options import Json
from onestill.cli.output import Target, is_file_name
from onestill.errors import OutputError

if TYPE_CHECKING:
    from onestill.data import ShardReader

__all__ = ["app", "open_shards"]

Shards = Annotated[
    list[str] | None, typer.Argument(metavar="SHARD|FOLDER", help="Tar files or folders of them. (default: sample)")
]
MOST_IN_SHEET = 1000

app = typer.Typer(help="Look at training data.", no_args_is_help=False)


def open_shards(sources: list[str], **options: Any) -> ShardReader:
    """A reader of shards given as files or folders; the name `sample`, or nothing at all, is the packaged set.

    Args:
        sources: see above.
        options: what `onestill.data.ShardReader` takes: seed, shuffle, epochs, size, images.

    Raises:
        DataError: a source does not exist, or nothing in them can be read.
    """
    from onestill.data import ShardReader, sample_shards

    named: list[Path] = []
    for source in sources or ["sample"]:
        named += sample_shards() if source == "sample" else [Path(source)]
    return ShardReader(named, **options)


@app.command("count")
def count(shards: Shards = None, as_json: Json = False) -> None:
    """Read every sample; count sizes, sets and licences, and name what had to be skipped.

    A sample made of two icons counts once for each set and licence that they come from.
    """
    reader = open_shards(shards or [], shuffle=False, epochs=1)
    sizes: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {"set": Counter(), "licence": Counter()}
    with progress("reading", len(reader)) as advance:
        for sample in reader:
            height, width = sample.image.shape[:2]
            sizes[f"{width}x{height}"] += 1
            for kind, counter in kinds.items():
                # A composition of two icons names both: "MIT + Apache-2.0".
                counter.update(set(str(sample.meta.get(kind, "unknown")).split(" + ")))
            advance(1)
    counted = {"sizes": sizes} | {f"{kind}s": counter for kind, counter in kinds.items()}
    if as_json:
        print_json({"samples": sizes.total(), "shards": len(reader.paths), **counted, "skipped": reader.skipped})
        return
    console = stdout_console()
    console.print(f"[bold]{sizes.total()}[/] samples in {len(reader.paths)} shards")
    for title, counter in counted.items():
        told = ", ".join(f"{name} {number}" for name, number in counter.most_common())
        console.print(f"[bold]{title}[/] {told}", highlight=False)
    for name, why in reader.skipped.items():
        note(f"skipped {name}: {why}")


@app.command("sheet")
def sheet(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="A .png, .jpg or .webp file.")],
    shards: Shards = None,
    number: Annotated[int, typer.Option("--number", min=1, max=MOST_IN_SHEET, metavar="N", help="Of pictures.")] = 48,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Which pictures.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Put pictures drawn at random on one sheet, each over its caption."""
    if not is_file_name(out):
        raise OutputError(f"'{out}' is not the name of a picture; end it in .png, .jpg or .webp.")
    target = Target(out, 1, force)
    from onestill.checkpoint import written_whole
    from onestill.pipeline.sheet import sheet as draw_sheet

    reader = open_shards(shards or [], seed=seed, shuffle=True, epochs=1)
    samples = [sample for _, sample in zip(range(number), reader, strict=False)]
    page = draw_sheet([sample.image for sample in samples], [sample.caption for sample in samples])
    path = target.path("", seed)
    with written_whole(path) as unfinished:
        page.save(unfinished, format={".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG"))
    print(path)
