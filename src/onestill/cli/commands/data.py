"""`onestill data`: look at shards, make them from a folder of pictures, and cache what networks make of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from onestill.cli.console import announced, note, note_device, print_json, progress, stdout_console
from onestill.cli.options import Device, Json
from onestill.cli.output import Target, is_file_name
from onestill.errors import DataError, OnestillError, OutputError, require

Shards = Annotated[
    list[str] | None,
    typer.Argument(metavar="SHARD|FOLDER", help="Tar files or folders of them. (default: sample, the packaged set)"),
]
MOST_IN_SHEET = 1000

app = typer.Typer(help="Make training data and look at it.", no_args_is_help=False)


@app.command("count")
def count(shards: Shards = None, as_json: Json = False) -> None:
    """Read every sample; count sizes, sets and licences, and name what had to be skipped.

    A sample made of two icons counts once for each set and licence that they come from.
    """
    from onestill.data import ShardReader

    reader = ShardReader(shards or ["sample"], shuffle=False, epochs=1)
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
    from rich.markup import escape

    console = stdout_console()
    console.print(f"[bold]{sizes.total()}[/] samples in {len(reader.paths)} shards")
    for title, counter in counted.items():
        counts = ", ".join(f"{name} {number}" for name, number in counter.most_common())
        console.print(f"[bold]{title}[/] {escape(counts)}", highlight=False)
    for name, why in reader.skipped.items():
        note(f"skipped {name}: {why}")


@app.command("sheet")
def sheet(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The sheet, a .png, .jpg or .webp file.")],
    shards: Shards = None,
    number: Annotated[int, typer.Option(min=1, max=MOST_IN_SHEET, metavar="N", help="Number of pictures.")] = 48,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Chooses the pictures.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Put pictures drawn at random on one sheet, each over its caption."""
    if not is_file_name(out):
        raise OutputError(f"'{out}' is not the name of a picture; end it in .png, .jpg or .webp.")
    target = Target(out, 1, force)
    from onestill.checkpoint import written_whole
    from onestill.data import ShardReader
    from onestill.pipeline.sheet import sheet as draw_sheet

    reader = ShardReader(shards or ["sample"], seed=seed, shuffle=True, epochs=1)
    samples = [sample for _, sample in zip(range(number), reader, strict=False)]
    page = draw_sheet([sample.image for sample in samples], [sample.caption for sample in samples])
    path = target.path("", seed)
    with written_whole(path) as unfinished:
        page.save(unfinished, format={".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG"))
    print(path)


@app.command("pack")
def pack(
    pictures: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of pictures, each with its caption.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="A new folder for the shards.")],
    size: Annotated[
        int, typer.Option(min=16, max=4096, metavar="PIXELS", help="The side of each square in pixels.")
    ] = 512,
    per_shard: Annotated[int, typer.Option(min=1, metavar="N", help="Number of samples in each shard.")] = 1000,
) -> None:
    """Make shards from a folder of pictures, cut to squares of one size.

    Captions are NAME.txt beside NAME.jpg, or rows of metadata.jsonl or metadata.csv with file_name and text.
    """
    from onestill.data import ShardWriter
    from onestill.data.pack import pack as packed

    _refuse_full(out)
    skipped: dict[str, str] = {}
    count = 0
    with ShardWriter(out, per_shard) as writer:
        for count, sample in enumerate(packed(pictures, size, skipped), 1):
            writer.write(f"{count:07d}-{sample.key}", sample.image, sample.caption, sample.meta)
    if not count:
        why = next((f" (the first: {name}: {reason})" for name, reason in skipped.items()), "")
        raise DataError(f"No picture in '{pictures}' can be used{why}: each needs a caption and a file that decodes.")
    _tell(skipped)
    print(f"{count} samples in {out}")


@app.command("fetch")
def fetch(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL", help="Addresses of shards, such as https://host/set-{0000..0099}.tar.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder for the shards.")],
    sha256: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The output of sha256sum for the shards; all must match. (default: not checked)"
        ),
    ] = None,
) -> None:
    """Copy shards from a web server or an object store. Run again, it continues where it stopped."""
    from onestill.data.remote import expand, read_hashes
    from onestill.data.remote import fetch as fetched

    hashes = read_hashes(sha256) if sha256 else None
    named = [one for url in urls for one in expand(url)]
    with progress("fetching", len(named)) as advance:
        for one in named:
            fetched(one, out, hashes)
            advance(1)
    print(f"{len(named)} shards in {out}")


@app.command("cache")
def cache(
    model: Annotated[Path, typer.Option("--model", "-m", metavar="FOLDER", help="A model in diffusers' format.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="A new folder for the shards.")],
    shards: Shards = None,
    device: Device = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=1024, metavar="N", help="Number of samples encoded at once.")
    ] = 8,
    part: Annotated[str, typer.Option(metavar="I/N", help="Encode every N-th sample from I on, such as 0/4.")] = "0/1",
) -> None:
    """Encode pictures and captions once, by a model's own autoencoder and text encoders, to train on."""
    first, _, parts = part.partition("/")
    if not (first.isdigit() and parts.isdigit() and int(first) < int(parts)):
        raise OnestillError(f"--part takes I/N with I below N, such as 0/4, not '{part}'.")
    for package in ("torch", "diffusers", "transformers"):
        require(package, "train")
    from onestill.data import ShardReader, ShardWriter
    from onestill.engine.device import choose
    from onestill.train.cache import cache_for_model

    where = choose(device)
    if parts == "1":
        _refuse_full(out)
    reader = ShardReader(shards or ["sample"], shuffle=False, epochs=1, part=(int(first), int(parts)))
    prefix = "shard" if parts == "1" else f"part-{first}"
    with ShardWriter(out, prefix=prefix) as writer, progress("encoding", len(reader) // int(parts)) as advance:

        def write(sample: Any, arrays: Any) -> None:
            writer.keep(sample, arrays)
            advance(1)

        samples = announced(reader, lambda: note_device(device, "torch", where))
        count = cache_for_model(samples, model, write, device=where, batch_size=batch_size)
    _tell(reader.skipped)
    print(f"{count} samples in {out}")


def _refuse_full(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"'{out}' is not empty; give the name of a new folder.")


def _tell(skipped: dict[str, str]) -> None:
    for name, why in skipped.items():
        note(f"left out {name}: {why}")
