"""Make the shipped model, all stages in order, from the icon table to the report.

    python -m recipes.icons.train --parquet icons.parquet                 # a day and a night on two cores
    python -m recipes.icons.train --parquet icons.parquet --form gpu      # teacher and student on a GPU
    python -m recipes.icons.train --parquet icons.parquet --from 3-teacher --to 4-student

The model is the same in both forms: `gpu` trains the teacher and the student there in large batches, on what the CPU
stages before them made, and the stages after them go on from its student.
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
FORMS = ("cpu", "gpu")
STAGES = ("shards", "networks", "1-autoencoder", "cache", "2-evaluator", "3-teacher", "4-student", "large-shards",
          "5-decoder", "ship-teacher", "ship", "report")  # fmt: skip
SMALL_PX, LARGE_PX = 128, 256  # of the latents' autoencoder, and of what is shown
SAMPLES = 48_000


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


def recipe(stage: str, form: str) -> Path:
    """The recipe of a stage that trains: the form's own, or the one that all forms share."""
    own = HERE / form / f"{stage}.toml"
    return own if own.is_file() else HERE / "cpu" / f"{stage}.toml"


def command(
    stage: str, form: str, parquet: str, runs: Path, data: Path, *, samples: int = 0, size: int = 0
) -> tuple[Path, list[str]]:
    """What a stage leaves behind when it is whole, and the command that makes it.

    Args:
        runs: a folder; what a GPU trains goes into `icons-gpu` in it, all else into `icons-cpu`.
        data: a folder for the pictures and for the networks of others.
        samples: how many the stages `shards` and `large-shards` draw for training; 0 is SAMPLES.
        size: the side of the pictures of `shards` in px; 0 is SMALL_PX.
    """
    shared, own = runs / "icons-cpu", runs / f"icons-{form}"
    small, large = data / f"icons{SMALL_PX}", data / f"icons{LARGE_PX}"
    vae, shown = shared / "autoencoder/export/vae", shared / "decoder/export/vae"
    teacher, student = own / "teacher/export/unet", own / "student/export/unet"
    place: tuple[str, ...]
    if stage in ("shards", "large-shards"):
        out, side = (small, size or SMALL_PX) if stage == "shards" else (large, LARGE_PX)
        arguments = ("--parquet", parquet, "--out", str(out), "--size", str(side), "--samples", str(samples or SAMPLES))
        done = out / "shards.done"
        return done, module("recipes.icons.render", *arguments, "--done", str(done))
    if stage == "networks":
        made = data / "networks/efficientnet-lite0/config.json"
        return made, module("recipes.icons.networks", "--out", str(data / "networks"))
    if stage == "cache":
        place = ("--shards", str(small / "train"), "--autoencoder", str(vae), "--out", str(small / "cached"))
        place += ("--device", "cuda", "--workers", "12") if form == "gpu" else ("--device", "cpu")
        return small / "cached.done", module("recipes.icons.cache", *place, "--done", str(small / "cached.done"))
    if stage == "ship-teacher":
        place = ("--out", str(own / "icons-teacher"), "--name", "icons-teacher", "--steps", "25", "--force")
        line = module("recipes.icons.ship", "--unet", str(teacher), "--autoencoder", str(shown), *place)
        return own / "icons-teacher/onestill.json", line
    if stage == "ship":
        place = ("--out", str(own / "icons"), "--int8", "--force")
        line = module("recipes.icons.ship", "--unet", str(student), "--autoencoder", str(shown), *place)
        return own / "icons/onestill.json", line
    if stage == "report":
        place = ("--teacher", str(own / "icons-teacher"), "--student", str(own / "icons"))
        place += ("--network", str(shared / "evaluator/export"), "--out", str(own / "report"))
        return own / "report/report.json", module("recipes.icons.evaluate", "--data", str(small), *place)
    results = {
        "1-autoencoder": vae / "config.json",
        "2-evaluator": shared / "evaluator/export/contrastive.json",
        "3-teacher": teacher / "config.json",
        "4-student": student / "config.json",
        "5-decoder": shown / "config.json",
    }
    line = module("onestill", "train", str(recipe(stage, form)), "--resume")
    if stage == "5-decoder" and form != "cpu":
        line += ["--set", f"decoder.student={student}"]
    return results[stage], line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", required=True, help="the icon table, from recipes.icons.build")
    parser.add_argument("--form", default="cpu", choices=FORMS)
    parser.add_argument("--from", dest="first", default=STAGES[0], choices=STAGES)
    parser.add_argument("--to", dest="last", default=STAGES[-1], choices=STAGES)
    parser.add_argument("--samples", type=int, default=0, help="training samples that are drawn")
    parser.add_argument("--size", type=int, default=0, help=f"side of the pictures in px ({SMALL_PX})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change the recipes of the stages that train; may be repeated")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(arguments)
    runs, data = Path("runs"), Path("data")
    for stage in STAGES[STAGES.index(options.first) : STAGES.index(options.last) + 1]:
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
