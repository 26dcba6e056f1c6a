"""What each way to be fast brings on a GPU, alone and on top of those before it; and whether it changes the picture.

    python benchmarks/ladder.py --random sdxl --out benchmarks/results/ladder.json

The first rung is the plain engine on the device, one call after the other; every picture is compared with its. The
figure beside a time is its multiple of the floor. Each measurement is a process of its own.
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

from onestill.cli.bench import found_model, with_floor
from onestill.errors import OnestillError
from onestill.evaluate.latency import Setting, measure_elsewhere, psnr
from onestill.evaluate.machine import machine

PLAIN = {"graphs": False, "channels_last": False, "fuse": False}
# name -> options, and whether the tiny decoder is used; each is added to those before it
RUNGS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "tiny VAE": ({}, True),
    "channels last": ({"channels_last": True}, True),
    "fused projections": ({"fuse": True}, True),
    "CUDA graphs": ({"graphs": True}, True),
    "compiled blocks": ({"compile": "regional"}, True),
    "compiled whole": ({"compile": "whole"}, True),
    "attention by cuDNN": ({"attention": "cudnn"}, True),
    "attention by flash": ({"attention": "flash"}, True),
    "int8": ({"quantize": "int8", "attention": None}, True),
    "fp8": ({"quantize": "fp8"}, True),
}


def settings(base: Setting, tiny: str | None) -> dict[str, dict[str, Setting]]:
    """rung -> "alone" and "together" -> what to measure."""
    found: dict[str, dict[str, Setting]] = {}
    together: dict[str, Any] = dict(PLAIN)
    for name, (options, wants_tiny) in RUNGS.items():
        together |= options
        needs = {"compile": "regional"} if "quantize" in options else {}  # never without, as it is slower then
        alone = PLAIN | options | needs
        rung = replace(base, dtype="bfloat16") if name == "fp8" else base  # the one type that it is had in
        found[name] = {
            "alone": replace(rung, options=alone, tiny_vae=tiny if name == "tiny VAE" else None),
            "together": replace(rung, options=dict(together), tiny_vae=tiny if wants_tiny else None),
        }
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every rung that there is time for; the report is written after each, as a lent machine may go."""
    ends = time.monotonic() + 60 * arguments.minutes
    at, weights = found_model(arguments.model, arguments.random, "torch", "random" if arguments.random else None)
    tiny = weights.get("tiny_vae", arguments.tiny_vae)
    base = Setting(
        "onestill", str(at), engine="torch", device=arguments.device, dtype=arguments.dtype, pictures=arguments.pictures
    )
    results: dict[str, Any] = {}
    report = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "model": f"random-{arguments.random}" if arguments.random else arguments.model,
        "machine": machine(),
        "results": results,
    }
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "plain-together.png"
        for name, kinds in settings(base, tiny).items():
            for kind in arguments.kinds if name != "plain" else ["together"]:
                if name in arguments.skip:
                    continue
                picture = Path(scratch) / f"{name}-{kind}.png".replace(" ", "-")
                try:
                    setting = replace(kinds[kind], picture=str(picture))
                    measured = with_floor(setting, measure_elsewhere(setting, most_s=max(ends - time.monotonic(), 1)))
                except OnestillError as error:
                    results.setdefault(name, {})[kind] = {"refused": str(error)}
                    continue
                kept = {key: measured[key] for key in KEPT if key in measured}
                close = psnr(picture, reference) if reference.is_file() else None
                results.setdefault(name, {})[kind] = kept | {"psnr_db": close}
                print(name, kind, kept["total_ms"]["p50"], "ms", file=sys.stderr, flush=True)
                write(report, arguments.out)
    write(report, arguments.out)
    return report


def write(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")


KEPT = (
    *("options", "device", "dtype", "load_ms", "first_ms", "encode_ms", "denoise_ms", "decode_ms", "total_ms"),
    *("cached_ms", "images_per_second", "peak_memory_mb", "floor_ms", "floor_multiple"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--random", choices=("sdxl", "sd21"))
    parser.add_argument("--tiny-vae", help="a folder with TAESD or TAESDXL")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--skip", nargs="*", default=[], choices=list(RUNGS), help="rungs to leave out")
    parser.add_argument("--kinds", nargs="*", default=["alone", "together"], choices=("alone", "together"))
    parser.add_argument("--minutes", type=float, default=60, help="rungs that are not done by then are refused")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments), indent=2))


if __name__ == "__main__":
    main()
