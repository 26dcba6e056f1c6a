"""Make the shipped model, all stages in order, from the icon table to the report.

    python -m recipes.icons.train --parquet icons.parquet                 # the CPU form, some eight hours on two cores
    python -m recipes.icons.train --parquet icons.parquet --form gpu      # 256 px, on a GPU; benchmarks/README.md
    python -m recipes.icons.train --parquet icons.parquet --from 3-teacher --to 4-student

A stage whose result exists is passed over; one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SIZE_PX = {"cpu": 128, "gpu": 256}
STAGES = ("shards", "1-autoencoder", "cache", "common", "2-evaluator", "3-teacher", "4-student", "large-shards",
          "5-decoder", "ship-teacher", "ship", "report")  # fmt: skip
# A GPU sees enough pictures to learn everything, and at their full size from the start.
FOR_CPUS = ("common", "large-shards", "5-decoder")
LARGE_PX = 256


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def command(stage: str, form: str, parquet: str, runs: Path, data: Path) -> tuple[Path, list[str]]:
    """What a stage leaves behind when it is whole, and the command that makes it."""
    vae = runs / "autoencoder/export/vae"
    shown, large = runs / "decoder/export/vae" if form == "cpu" else vae, data.with_name(f"icons{LARGE_PX}")
    teacher, student = runs / "teacher/export/unet", runs / "student/export/unet"
    if stage == "shards":
        arguments = ("--parquet", parquet, "--out", str(data), "--size", str(SIZE_PX[form]))
        done = ("--done", str(data / "shards.done"))
        return data / "shards.done", module("recipes.icons.render", *arguments, *done)
    if stage == "large-shards":
        arguments = ("--parquet", parquet, "--out", str(large), "--size", str(LARGE_PX))
        arguments += ("--splits", "train", "--samples", "30000")
        return large / "shards.done", module("recipes.icons.render", *arguments, "--done", str(large / "shards.done"))
    if stage == "cache":
        arguments = ("--shards", str(data / "train"), "--autoencoder", str(vae), "--out", str(data / "cached"))
        arguments += ("--device", "cuda", "--workers", "12") if form == "gpu" else ("--device", "cpu")
        arguments += ("--done", str(data / "cached.done"))
        return data / "cached.done", module("recipes.icons.cache", *arguments)
    if stage == "common":
        arguments = ("--shards", str(data / "cached"), "--out", str(data / "common"))
        return data / "common.done", module("recipes.icons.common", *arguments, "--done", str(data / "common.done"))
    if stage == "ship-teacher":
        place = ("--out", str(runs / "icons-teacher"), "--name", "icons-teacher", "--steps", "25", "--force")
        arguments = ("--unet", str(teacher), "--autoencoder", str(vae), *place)
        return runs / "icons-teacher/onestill.json", module("recipes.icons.ship", *arguments)
    if stage == "ship":
        made = runs / "icons/onestill.json"
        place = ("--out", str(runs / "icons"), "--int8", "--force")
        arguments = ("--unet", str(student), "--autoencoder", str(shown), *place)
        return made, module("recipes.icons.ship", *arguments)
    if stage == "report":
        folders = ("--teacher", str(runs / "icons-teacher"), "--student", str(runs / "icons"))
        network = ("--network", str(runs / "evaluator/export"), "--out", str(runs / "report"))
        return runs / "report/report.json", module("recipes.icons.evaluate", "--data", str(data), *folders, *network)
    results = {
        "1-autoencoder": vae / "config.json",
        "2-evaluator": runs / "evaluator/export/contrastive.json",
        "3-teacher": teacher / "config.json",
        "4-student": student / "config.json",
        "5-decoder": shown / "config.json",
    }
    return results[stage], module("onestill", "train", str(HERE / form / f"{stage}.toml"), "--resume")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", required=True, help="the icon table, from recipes.icons.build")
    parser.add_argument("--form", default="cpu", choices=tuple(SIZE_PX))
    parser.add_argument("--from", dest="first", default=STAGES[0], choices=STAGES)
    parser.add_argument("--to", dest="last", default=STAGES[-1], choices=STAGES)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(arguments)
    runs, data = Path(f"runs/icons-{options.form}"), Path(f"data/icons{SIZE_PX[options.form]}")
    for stage in STAGES[STAGES.index(options.first) : STAGES.index(options.last) + 1]:
        if stage in FOR_CPUS and options.form == "gpu":
            continue
        result, line = command(stage, options.form, options.parquet, runs, data)
        if result.exists() and not options.dry_run:
            print(f"{stage}: {result} is there")
            continue
        print(f"{stage}: {' '.join(line)}", flush=True)
        if not options.dry_run:
            subprocess.run(line, check=True)


if __name__ == "__main__":
    main()
