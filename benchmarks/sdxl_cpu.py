"""SDXL's size on a CPU: onestill on OpenVINO and torch against diffusers, with random weights, in one run.

    python benchmarks/sdxl_cpu.py --out benchmarks/results/sdxl_cpu.json

Every contender draws the same prompts at 512 x 512 px in one step with the same weights, in a process of its own, one
after the other. The weights are random (`onestill.engine.random_weights`): only times and memory mean anything. Needs
the extra `torch`, 24 GB of memory and 15 GB of disk; making the weights and OpenVINO's form of them is not counted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from onestill.cli.bench import found_model, machine
from onestill.evaluate.latency import Setting, measure_elsewhere

SIZE_PX = 512


def contenders(kind: str) -> dict[str, Setting]:
    """By the names in the table; the first is what the others are compared with."""
    form, weights = found_model("", kind, "openvino", "random")
    ours = Setting("onestill", str(form), engine="openvino", dtype="bfloat16", height=SIZE_PX, width=SIZE_PX, steps=1)
    plain = replace(ours, model=weights["model"], engine=None)
    tiny = replace(plain, tiny_vae=weights["tiny_vae"])
    return {
        "onestill, OpenVINO bfloat16, tiny VAE": ours,
        "onestill, torch bfloat16, tiny VAE": replace(tiny, engine="torch"),
        "diffusers bfloat16, tiny VAE": replace(tiny, contender="diffusers"),
        "diffusers float32, tiny VAE": replace(tiny, contender="diffusers", dtype="float32"),
        "diffusers float32, its own VAE": replace(plain, contender="diffusers", dtype="float32"),
    }


def table(report: dict[str, Any]) -> str:
    lines = [
        "| SDXL's size, 512 x 512 px, one step | words to pixels | encode | step | decode | loading | peak memory |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name, one in report["results"].items():
        parts = [f"{one[part]['p50'] / 1000:.2f} s" for part in ("total_ms", "encode_ms", "denoise_ms", "decode_ms")]
        ratio = f" ({report['times_as_long'][name]:.1f}x)"
        rest = [f"{one['load_ms'] / 1000:.0f} s", f"{one['peak_memory_mb'] / 1000:.1f} GB"]
        lines.append(f"| {name} | {parts[0]}{ratio} | {' | '.join([*parts[1:], *rest])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="sdxl", choices=("sdxl", "sd21"))
    parser.add_argument("--pictures", type=int, default=3, help="per contender")
    parser.add_argument("--warm-up", type=int, default=1, help="pictures before those that count")
    parser.add_argument("--threads", type=int, help="for every contender; each chooses its own when left out")
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of the contenders to run, from 0")
    parser.add_argument("--out", type=Path, help="where to write the report as JSON")
    arguments = parser.parse_args()
    found = list(contenders(arguments.kind).items())
    results: dict[str, Any] = {}
    for number in range(len(found)) if arguments.only is None else arguments.only:
        name, setting = found[number]
        print(name, file=sys.stderr, flush=True)
        calls = {"pictures": arguments.pictures, "warm_up": arguments.warm_up, "repeats": 0}
        asked = replace(setting, **calls, threads=arguments.threads)
        # Paths say where this machine keeps its cache, which is nobody's business.
        results[name] = measure_elsewhere(asked) | {"model": f"random-{arguments.kind}", "tiny_vae": None}
        report = {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "model": f"random-{arguments.kind}",
            "machine": machine(),
            "results": results,
            "times_as_long": {
                other: round(one["total_ms"]["p50"] / next(iter(results.values()))["total_ms"]["p50"], 2)
                for other, one in results.items()
            },
        }
        if arguments.out:  # after each, as each takes minutes
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
