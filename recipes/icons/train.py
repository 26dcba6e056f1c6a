"""Make the shipped model, all stages in order, from the icon table to the report.

    python -m recipes.icons.train --parquet icons.parquet                 # the CPU form, some eight hours on two cores
    python -m recipes.icons.train --parquet icons.parquet --form gpu      # 256 px, on a GPU; docs/gpu-worklist.md
    python -m recipes.icons.train --parquet icons.parquet --from 3-teacher --to 4-student

A stage whose result exists is passed over; one that was interrupted goes on from its last checkpoint. Ctrl-C, SIGTERM
and SIGHUP stop a stage that trains once it has saved: `timeout -s INT 3600 python -m recipes.icons.train ...` is an
hour's work, and the next call goes on.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

HERE = Path(__file__).parent
SIZE_PX = {"cpu": 128, "gpu": 256}
STAGES = ("shards", "1-autoencoder", "cache", "common", "2-evaluator", "3-teacher", "4-student", "large-shards",
          "5-decoder", "ship-teacher", "ship", "report")  # fmt: skip
# A GPU sees enough pictures to learn everything, and at their full size from the start.
FOR_CPUS = ("common", "large-shards", "5-decoder")
LARGE_PX = 256


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def trains(stage: str) -> bool:
    """Whether a stage is a recipe of `onestill train`: those have numbers."""
    return stage[0].isdigit()


def run(line: Sequence[str], *, saves: bool) -> int:
    """Run a command and return its exit status; a signal to stop goes on to it, and it is waited for.

    Args:
        saves: it heeds SIGTERM and SIGHUP. Others are told to stop by Ctrl-C, at which Python cleans up.
    """
    child: subprocess.Popen[bytes] | None = None
    asked: list[int] = []

    def forward(signum: int, _frame: FrameType | None) -> None:
        asked.append(signum)
        if child is not None:
            child.send_signal(signum if saves else signal.SIGINT)

    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [signum for signum in signals if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN]
    before = [signal.signal(signum, forward) for signum in heard]
    try:
        child = subprocess.Popen(line)
        if asked:  # while it started
            forward(asked[0], None)
        status = child.wait()
    finally:
        for signum, handler in zip(heard, before, strict=True):
            signal.signal(signum, handler)
    failed = 0 < status < 128  # with a sentence of its own, such as that the disk is full
    return 128 + asked[0] if asked and not failed else status if status >= 0 else 128 - status


def command(
    stage: str, form: str, parquet: str, runs: Path, data: Path, *, samples: int = 0, size: int = 0
) -> tuple[Path, list[str]]:
    """What a stage leaves behind when it is whole, and the command that makes it.

    Args:
        samples: how many the stage `shards` draws for training; 0 is what `recipes.icons.render` says.
        size: the side of its pictures in px; 0 is the form's.
    """
    vae = runs / "autoencoder/export/vae"
    shown, large = runs / "decoder/export/vae" if form == "cpu" else vae, data.with_name(f"icons{LARGE_PX}")
    teacher, student = runs / "teacher/export/unet", runs / "student/export/unet"
    if stage == "shards":
        arguments = ("--parquet", parquet, "--out", str(data), "--size", str(size or SIZE_PX[form]))
        arguments += ("--samples", str(samples)) if samples else ()
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", required=True, help="the icon table, from recipes.icons.build")
    parser.add_argument("--form", default="cpu", choices=tuple(SIZE_PX))
    parser.add_argument("--from", dest="first", default=STAGES[0], choices=STAGES)
    parser.add_argument("--to", dest="last", default=STAGES[-1], choices=STAGES)
    parser.add_argument("--samples", type=int, default=0, help="training samples that the stage shards draws")
    parser.add_argument("--size", type=int, default=0, help="side of those pictures in px, if not the form's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change the recipes of the stages that train; may be repeated")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(arguments)
    runs, data = Path(f"runs/icons-{options.form}"), Path(f"data/icons{SIZE_PX[options.form]}")
    for stage in STAGES[STAGES.index(options.first) : STAGES.index(options.last) + 1]:
        if stage in FOR_CPUS and options.form == "gpu":
            continue
        drawn = {"samples": options.samples, "size": options.size}
        result, line = command(stage, options.form, options.parquet, runs, data, **drawn)
        if trains(stage):
            line += [word for setting in options.set for word in ("--set", setting)]
        if result.exists() and not options.dry_run:
            print(f"{stage}: {result} is there")
            continue
        print(f"{stage}: {' '.join(line)}", flush=True)
        if not options.dry_run and (status := run(line, saves=trains(stage))):
            print(f"{stage}: ended with exit status {status}", file=sys.stderr)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
