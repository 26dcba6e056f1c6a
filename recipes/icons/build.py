"""Build icons.parquet from the packages that `fetch.py` fetched.

    python -m recipes.icons.fetch --out sources
    python -m recipes.icons.build --sources sources --out icons.parquet

Takes about ten minutes on two cores. Prints what was left out and why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from onestill.errors import DataError
from recipes.icons.clipart import CREDIT, ClipArt
from recipes.icons.collect import FLUENT_3D_CREDIT, Collector, Sources
from recipes.icons.looks import looks_of, near_copies
from recipes.icons.packages import CLIPART, unpacked
from recipes.icons.splits import held_concepts, name_concepts, split
from recipes.icons.table import Icon, write_table


def captionable(icon: Icon) -> bool:
    """Whether an icon's name is worth a caption; in colour sets the abstract ones are kept and marked."""
    return not icon.junk or (icon.palette and icon.junk == "abstract")


def distinct(icons: Sequence[Icon], processes: int) -> tuple[list[Icon], Counter[str]]:
    """The icons that can be drawn and are no near-copies of earlier ones, their colours set; a count of the others."""
    with ProcessPoolExecutor(processes) as pool:
        looks = list(pool.map(looks_of, icons, chunksize=500))
    seen = [(icon, look) for icon, look in zip(icons, looks, strict=True) if look is not None]
    for icon, look in seen:
        icon.colors = look.colours
    drawn = [icon for icon, _ in seen]
    copies = near_copies(drawn, [look for _, look in seen])
    kept = [icon for icon, copy in zip(drawn, copies, strict=True) if copy < 0]
    return kept, Counter({"blank or broken": len(icons) - len(drawn), "near-copy": len(drawn) - len(kept)})


def build(sources: Path, out: Path, processes: int) -> Counter[str]:
    """Build the table; returns how many icons were left out, by reason."""
    opened = Sources.open(sources)
    collector = Collector(opened)
    art = ClipArt(unpacked(sources, CLIPART), opened.namer, opened.wordnet)
    collected = [*collector.icons(), *art.icons()]
    print(f"{len(collected)} icons read", file=sys.stderr, flush=True)
    icons = [icon for icon in collected if captionable(icon)]
    dropped = collector.dropped + art.dropped
    dropped += Counter(f"name: {icon.junk}" for icon in collected if not captionable(icon))
    print(f"{len(icons)} are worth a caption: drawing them", file=sys.stderr, flush=True)
    icons, lost = distinct(icons, processes)
    name_concepts(icons, opened.wordnet)
    split(icons, opened.wordnet, held_concepts())
    interface = {icon.set for icon in icons} - {"fluent-emoji-3d", "openclipart"}
    attribution = {name: opened.iconify.attribution(name) for name in interface}
    attribution |= {"fluent-emoji-3d": FLUENT_3D_CREDIT, "openclipart": CREDIT}
    write_table(icons, attribution, out)
    return dropped + lost + Counter({"kept": len(icons)})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", required=True, type=Path, help="the folder that fetch.py filled")
    parser.add_argument("--out", required=True, type=Path, help="the table to write")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    try:
        for reason, count in sorted(build(options.sources, options.out, options.processes).items()):
            print(f"{count:7} {reason}")
    except (DataError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
