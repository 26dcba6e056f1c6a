"""The icons: pictures to latents, then the teacher, then the student, each for as long as there is time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.quarter.drawing import end_drawing, shards_in
from benchmarks.quarter.steps import LeftOutError, Run
from benchmarks.quarter.training import Training, train_for
from onestill.data import Sample, ShardReader, ShardWriter
from onestill.networks.latents import LatentSpace
from onestill.networks.text_encoder import open_text_encoder
from onestill.train.cache import cache_samples
from onestill.train.discriminator.cnn import LITE0

__all__ = ["latents", "student", "teacher"]

BATCH = 256  # pictures that are encoded together
REHEARSAL_S = 4.0  # that a training takes
PREFERRED_WAIT = 0.5  # of the step's time, where not one shard is whole yet


def latents(run: Run, seconds: float, note: Callable[..., None]) -> Mapping[str, Any]:
    """Encode what has been drawn, by the autoencoder that came along, as far as the time goes."""
    ends = time.monotonic() + 0.9 * seconds
    options = run.options
    shards: list[Path] = [Path(options.shards)] if options.shards else []
    if not shards:
        drawn = shards_in(run.work / "shards" / "train")
        note(drawing=end_drawing(run.work, 0 if drawn else PREFERRED_WAIT * seconds))
        shards = shards_in(run.work / "shards" / "train")
    if not shards:
        raise LeftOutError("There are no pictures: give --parquet to draw some, or --shards.")
    space, encoder = LatentSpace.load(options.autoencoder), open_text_encoder(options.text_encoder)
    workers = 0 if run.rehearses else max(1, (os.cpu_count() or 1) - 2)
    reader = ShardReader(shards, shuffle=False, epochs=1, workers=workers)
    began = time.monotonic()
    batch = min(BATCH, options.samples_per_shard)
    try:
        with ShardWriter(run.work / "cached", options.samples_per_shard) as writer:
            device = torch.device(run.device)
            some = before(ends, reader)
            count = cache_samples(some, space.to(device), encoder.to(device), writer.keep, batch)
    finally:
        reader.close()
    rate = count / max(time.monotonic() - began, 1e-9)
    return {"samples": count, "of": len(reader), "per_s": round(rate, 1), "scaling_factor": space.scale}


def before(ends: float, samples: Iterable[Sample]) -> Iterator[Sample]:
    """The samples, until the time is up."""
    for sample in samples:
        if time.monotonic() > ends:
            return
        yield sample


def teacher(run: Run, seconds: float, note: Callable[..., None]) -> Mapping[str, Any]:
    """Train the teacher on them."""
    return train_for(run, training(run, "teacher"), min(seconds, REHEARSAL_S) if run.rehearses else seconds, note)


def student(run: Run, seconds: float, note: Callable[..., None]) -> Mapping[str, Any]:
    """Distil the student from the teacher, or go on where it stands."""
    return train_for(run, training(run, "student"), min(seconds, REHEARSAL_S) if run.rehearses else seconds, note)


def training(run: Run, name: str) -> Training:
    """The recipe of a role with what the run knows: where its data, its parts and its results are."""
    options = run.options
    cached = run.work / "cached"
    if not shards_in(cached):
        raise LeftOutError("There are no latents to train on.")
    recipe = Path(getattr(options, f"{name}_recipe"))
    method = "diffusion" if name == "teacher" else "add"
    sets = [f'data.shards=["{cached}"]', f"loop.device={run.device}", f'{method}.autoencoder="{options.autoencoder}"']
    sets += [f'{method}.text_encoder="{options.text_encoder}"']
    if name == "student":
        made = Path(options.teacher) if options.teacher else run.work / "teacher" / "export" / "unet"
        if not (made / "config.json").is_file():
            raise LeftOutError("There is no teacher to distil: its step made none, and --teacher names none.")
        sets += [f'add.teacher="{made}"', f'add.features.cnn="{Path(options.networks) / LITE0}"']
    if run.rehearses:
        sets += small(name, options)
    sets += options.set_teacher if name == "teacher" else options.set_student
    return Training(name, recipe, sets, run.work / name)


def small(name: str, options: Any) -> list[str]:
    """What makes a recipe one for a rehearsal: the same, a few thousand weights wide."""
    config = json.loads((Path(options.autoencoder) / "config.json").read_text(encoding="utf-8"))
    widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
    loop = ["batch_size=4", "warmup=0", "precision=no", "compile=false", "threads=1"]
    sets = [*(f"loop.{one}" for one in loop), "data.workers=0"]
    if name == "student":
        return [*sets, "add.adversarial.heads_first=0", "add.heads.width=8"]
    encoder: Any = open_text_encoder(options.text_encoder)
    unet = [f"channels={config['latent_channels']}", f"sample_size={options.pixels // 2 ** (len(widths) - 1)}"]
    unet += [f"text_width={encoder(['']).text.shape[-1]}", "block_out_channels=[16, 32]", "attention=[false, true]"]
    unet += ["head_dim=8", "groups=8", "layers_per_block=1"]
    return [*sets, *(f"diffusion.unet.{one}" for one in unet), "diffusion.sheet_steps=2"]
