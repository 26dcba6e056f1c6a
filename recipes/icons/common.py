"""Keep the samples of common things, all shapes and a few of the rest: what a small model can learn in an hour.

    python -m recipes.icons.common --shards data/icons128/cached --out data/icons128/common

A thing is the more common the more styles it is drawn in, then the more often. A model of ten million weights that sees
four hundred thousand pictures learns eight hundred things from nine styles each better than six thousand seen a few
times; the sixth of the others that stays keeps it from forgetting what their words look like.
"""

from __future__ import annotations

import argparse
import json
import random
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

SAMPLES_PER_SHARD = 2500
Key = tuple[Path, str]  # the shard and the sample's key in it


def facts_of(shards: Sequence[Path]) -> dict[Key, dict[str, Any]]:
    """The JSON of every sample."""
    facts = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    facts[shard, member.name.partition(".")[0]] = json.load(tar.extractfile(member))  # type: ignore[arg-type]
    return facts


def common(facts: Mapping[Key, Mapping[str, Any]], things: int, others: float, seed: int) -> set[Key]:
    """The samples to keep: those of the `things` most common, every shape, and a share `others` of what is left."""
    styles = defaultdict(set)
    for fact in facts.values():
        styles[fact.get("concept")].add(fact["style"])
    count = Counter(fact.get("concept") for fact in facts.values())
    ranked = sorted(styles, key=lambda thing: (-len(styles[thing]), -count[thing], str(thing)))
    kept = set(ranked[:things])
    rng = random.Random(seed)
    return {
        key
        for key, fact in sorted(facts.items(), key=lambda item: (str(item[0][0]), item[0][1]))
        if (fact.get("concept") in kept and " + " not in fact["style"])
        or fact.get("set") == "shapes"
        or rng.random() < others
    }


def copy(shards: Sequence[Path], keys: set[Key], out: Path) -> int:
    """Write the samples of `keys`, byte for byte, to new shards in `out`; returns how many."""
    out.mkdir(parents=True, exist_ok=True)
    done = 0
    with ExitStack() as stack:
        samples = _members(shards, keys, stack)
        while shardful := list(islice(samples, SAMPLES_PER_SHARD)):
            with tarfile.open(out / f"shard-{done // SAMPLES_PER_SHARD:06d}.tar", "w") as target:
                for source, members in shardful:
                    for member in members:
                        target.addfile(member, source.extractfile(member))
            done += len(shardful)
    return done


def _members(
    shards: Sequence[Path], keys: set[Key], stack: ExitStack
) -> Iterator[tuple[tarfile.TarFile, list[tarfile.TarInfo]]]:
    for shard in shards:
        source = stack.enter_context(tarfile.open(shard))  # noqa: SIM115
        samples = defaultdict(list)
        for member in source:
            samples[member.name.partition(".")[0]].append(member)
        yield from ((source, members) for key, members in samples.items() if (shard, key) in keys)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="a folder of cached shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--things", type=int, default=800)
    parser.add_argument("--others", type=float, default=1 / 6, help="the share of all other samples that stays")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--done", type=Path, help="an empty file to leave when everything is written")
    options = parser.parse_args(arguments)
    shards = sorted(options.shards.glob("*.tar"))
    keys = common(facts_of(shards), options.things, options.others, options.seed)
    print(f"{copy(shards, keys, options.out)} samples in {options.out}")
    if options.done:
        options.done.touch()


if __name__ == "__main__":
    main()
