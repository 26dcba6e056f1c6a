"""Pack the sample set that comes with the package: a few hundred MIT and Apache-2.0 icons for tests and examples.

    python -m recipes.icons.sample_set --parquet icons.parquet

writes src/onestill/data/sample/icons-000000.tar: samples as `render.py` draws them, each with its author in its JSON,
and NOTICE beside it.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onestill.data.shards import ShardReader, ShardWriter
from recipes.icons.mix import Mix
from recipes.icons.notice import SAMPLE_HEAD, credits_of, notice
from recipes.icons.render import encode, meta_of, read_rows

FOLDER = Path(__file__).parents[2] / "src" / "onestill" / "data" / "sample"
LICENCES = ("MIT", "Apache-2.0")
_SIZE = 128


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


def write_notice(shard: Path, credit: Mapping[str, Mapping[str, str]]) -> Path:
    """Write who made the pictures of a sample set into NOTICE beside it."""
    reader = ShardReader(shard, shuffle=False, epochs=1, images=False)
    counts = Counter(name for sample in reader for name in sample.meta["set"].split(" + "))
    path = shard.with_name("NOTICE")
    path.write_text(notice(SAMPLE_HEAD, credit, counts), encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", required=True, help="the icon table")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    rows = read_rows(options.parquet)
    credit = credits_of(options.parquet)
    path = write_sample_set(rows, credit, options.out, options.samples, options.seed)
    write_notice(path, credit)
    print(f"{path}: {options.samples} samples, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
