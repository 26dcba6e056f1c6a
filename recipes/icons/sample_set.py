"""Pack the sample set that comes with the package: a few hundred MIT and Apache-2.0 icons for tests and examples.

    python -m recipes.icons.sample_set --parquet icons.parquet

writes src/onestill/data/sample/icons-000000.tar: samples as `render.py` draws them, each with its author in its JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from onestill.data.shards import ShardWriter
from recipes.icons import shapes
from recipes.icons.mix import Mix
from recipes.icons.render import encode, meta_of, read_rows

FOLDER = Path(__file__).parents[2] / "src" / "onestill" / "data" / "sample"
LICENCES = ("MIT", "Apache-2.0")
_SIZE = 128


def credits_of(parquet: str | Path) -> dict[str, dict[str, str]]:
    """Set -> name, author, licence and, where it is known, url."""
    stored = pq.read_schema(parquet).metadata[b"attribution"]
    found: dict[str, dict[str, str]] = json.loads(stored)
    return {**found, shapes.SET: shapes.ATTRIBUTION}


def write_sample_set(
    rows: Sequence[Mapping[str, Any]], credit: Mapping[str, Mapping[str, str]], folder: Path, samples: int, seed: int
) -> Path:
    """Draw `samples` training samples of permissively licensed rows, no two of the same picture, into one shard."""
    mix = Mix([row for row in rows if row["licence"] in LICENCES])
    seen: set[str] = set()
    with ShardWriter(folder, samples, prefix="icons") as writer:
        number = 0
        while len(seen) < samples:
            number += 1
            drawn, shown = mix.draw(_SIZE, random.Random(f"sample set/{seed}/{number}"))
            meta = meta_of(drawn, shown, "train", number)
            if meta["id"] in seen:
                continue
            meta["author"] = " + ".join(credit[row["set"]]["author"] for row in shown)
            writer.write(f"sample-{len(seen):04d}", encode(drawn, method=6), drawn.caption, meta)
            seen.add(meta["id"])
    return writer.paths[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", required=True, help="the icon table")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    rows = read_rows(options.parquet)
    path = write_sample_set(rows, credits_of(options.parquet), options.out, options.samples, options.seed)
    print(f"{path}: {options.samples} samples, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
