"""SDXL's size on a CPU: onestill on OpenVINO and torch against diffusers, with random weights, in one run.

    python benchmarks/sdxl_cpu.py --prepare                                        # once: the weights, in two forms
    python benchmarks/sdxl_cpu.py --out benchmarks/results/sdxl_cpu.json --resume  # under 20 minutes

Every contender draws the same prompts at 512 x 512 px in one step with the same weights, in a process of its own, one
after the other; a line comes as each has finished, and the report is written then, so that `--resume` goes on with the
next. diffusers computes in float32, its fastest on a CPU without bfloat16, and in bfloat16 too. The weights are random
(`onestill.networks.random_weights`): only times and memory mean anything; pictures are compared with diffusers' to show
that it is the same network. Needs the extra `torch`, 16 GB of free memory (diffusers in float32) and 11 GB of disk in
the cache folder, which ONESTILL_CACHE names.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from onestill.engine.openvino.runtime import shared_core

from onestill.bench.latency import measure_elsewhere, psnr
from onestill.bench.machine import machine
from onestill.bench.setting import Setting
from onestill.cli.console import note
from onestill.errors import OnestillError
from onestill.export.random_models import cached_random_model, cached_random_openvino

SIZE_PX = 512
OURS = "onestill, OpenVINO int8, tiny VAE"
THEIRS = "diffusers float32, tiny VAE"  # what ours is compared with
OTHER_VAE = "diffusers float32, its own VAE"


def contenders(kind: str, pictures: int, warm_up: int) -> dict[str, Setting]:
    """By the names in the table, those first that the comparison needs."""
    model = cached_random_model(kind, note)
    form = cached_random_openvino(kind, str(model / "tiny_vae"), "int8", note)
    asked = Setting("onestill", str(form), engine="openvino", dtype="int8", height=SIZE_PX, width=SIZE_PX, steps=1)
    ours = replace(asked, pictures=pictures, warm_up=warm_up, repeats=0)
    other = "bfloat16" if "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "float32"
    plain = replace(ours, model=str(model), dtype="float32", engine=None)
    tiny = replace(plain, tiny_vae=str(model / "tiny_vae"))
    return {
        OURS: ours,
        THEIRS: replace(tiny, contender="diffusers"),
        f"onestill, OpenVINO {other}, tiny VAE": replace(ours, dtype=other),
        "onestill, torch float32, tiny VAE": replace(tiny, engine="torch"),
        OTHER_VAE: replace(plain, contender="diffusers"),
        "diffusers bfloat16, tiny VAE": replace(tiny, contender="diffusers", dtype="bfloat16", pictures=1, warm_up=1),
    }


def row(name: str, one: dict[str, Any], times_as_long: float | None) -> str:
    if "failed" in one:
        return f"| {name} | {one['failed']} | | | | | | |"
    parts = [f"{one[part]['p50'] / 1000:.2f} s" for part in ("total_ms", "encode_ms", "denoise_ms", "decode_ms")]
    ratio = "" if times_as_long is None else f" ({times_as_long:.2f}x)"
    rest = [
        f"{one['load_ms'] / 1000:.0f} s",
        f"{one['first_ms'] / 1000:.1f} s",
        f"{one['peak_memory_mb'] / 1000:.1f} GB",
    ]
    return f"| {name} | {parts[0]}{ratio} | {' | '.join([*parts[1:], *rest])} |"


def table(report: dict[str, Any]) -> str:
    heads = ("words to pixels", "encode", "step", "decode", "loading", "first picture", "peak memory")
    lines = [f"| SDXL's size, {SIZE_PX} x {SIZE_PX} px, one step | {' | '.join(heads)} |", "|---" * 8 + "|"]
    lines += [row(name, one, report.get("times_as_long", {}).get(name)) for name, one in report["results"].items()]
    return "\n".join(lines)


def compare(results: dict[str, Any], pictures: Path) -> dict[str, float]:
    """Say how near each picture is to diffusers' in float32, and return how many times as long as ours each took."""
    for name, one in results.items():
        both = drawn(pictures, name), drawn(pictures, THEIRS)
        if name not in (THEIRS, OTHER_VAE) and all(path.is_file() for path in both):
            one["psnr_db"] = psnr(*both)
    ours = results.get(OURS, {})
    timed = {name: one["total_ms"]["p50"] for name, one in results.items() if "total_ms" in one and "total_ms" in ours}
    return {name: round(total / ours["total_ms"]["p50"], 2) for name, total in timed.items()}


def drawn(pictures: Path, name: str) -> Path:
    return pictures / f"{name.replace(',', '').replace(' ', '-')}.png"


def run(arguments: argparse.Namespace, pictures: Path) -> dict[str, Any]:
    """Every contender that is not in the report yet, while there is time."""
    ends = time.monotonic() + 60 * arguments.minutes
    found = contenders(arguments.kind, arguments.pictures, arguments.warm_up)
    report: dict[str, Any] = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "model": f"random-{arguments.kind}",
        "machine": machine(),
        "results": {},
    }
    if arguments.resume and arguments.out.is_file():
        report = json.loads(arguments.out.read_text())
    results = report["results"]
    for name in found if arguments.only is None else [list(found)[number] for number in arguments.only]:
        if "total_ms" in results.get(name, {}):
            continue
        left_s = ends - time.monotonic()
        print(f"{name}, at most {left_s:.0f} s", file=sys.stderr, flush=True)
        setting = replace(found[name], threads=arguments.threads, picture=str(drawn(pictures, name)))
        try:
            measured = measure_elsewhere(setting, most_s=max(left_s, 1))
            # Paths say where this machine keeps its cache, which is nobody's business.
            results[name] = measured | {"model": report["model"], "tiny_vae": None, "picture": None}
        except OnestillError as error:
            results[name] = {"failed": str(error), "stderr": getattr(error, "stderr", "")}
        report["times_as_long"] = compare(results, pictures)
        print(row(name, results[name], report["times_as_long"].get(name)), flush=True)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="sdxl", choices=("sdxl", "sd21"))
    parser.add_argument("--prepare", action="store_true", help="only make what is drawn with")
    parser.add_argument("--pictures", type=int, default=4, help="per contender")
    parser.add_argument("--warm-up", type=int, default=1, help="pictures before those that count")
    parser.add_argument("--threads", type=int, help="for every contender; each chooses its own when left out")
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of the contenders to run, from 0")
    parser.add_argument("--minutes", type=float, default=20, help="for the whole run; what is not done by then fails")
    parser.add_argument("--resume", action="store_true", help="keep what --out has measured already")
    parser.add_argument("--out", type=Path, help="where to write the report as JSON")
    arguments = parser.parse_args()
    if arguments.resume and arguments.out is None:
        parser.error("--resume needs --out")
    if arguments.prepare:
        contenders(arguments.kind, arguments.pictures, arguments.warm_up)
        return
    with tempfile.TemporaryDirectory() as pictures:
        print(table(run(arguments, Path(pictures))))


if __name__ == "__main__":
    main()
