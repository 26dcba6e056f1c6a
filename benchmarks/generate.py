"""How long words take to become a picture: onestill on OpenVINO in each of its dtypes, on torch, diffusers, and from a
cold shell, which draws in the default dtype, the first in the table.

    python benchmarks/generate.py --out benchmarks/results/generate.json

All contenders draw the same prompts with the same weights, seeds and steps, in one run. Each measures in a process of
its own, as they would share thread pools in one; they take turns, so that a machine that slows down slows all of them.
Every prompt is new to the process that draws it, and one step is words to pixels: tokens, text encoder, UNet, decoder,
uint8. Needs the extra `torch`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onestill
from onestill.bench.machine import machine
from onestill.engine.openvino.shared_weights import read_int8

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "pink", "brown")
THINGS = ("apple", "bicycle", "heart", "house", "star", "cat", "key", "cloud", "boat", "book", "bell", "tree")
STYLES = ("fluent 3d emoji", "flat emoji", "line icon", "filled icon", "pixel art")
PROMPTS = [f"a {colour} {thing}, {style}" for style in STYLES for thing in THINGS for colour in COLOURS]
COLD_PROMPT = "a red apple, fluent 3d emoji"

Draw = Callable[[str, int], Any]  # (prompt, seed) -> uint8 [H, W, 3] or a PIL image


def openvino_in(dtype: str, model: str, steps: int, threads: int | None) -> Draw:
    pipe = onestill.load(model, engine="openvino", dtype=dtype, threads=threads)
    return lambda prompt, seed: pipe(prompt, seed=seed, num_inference_steps=steps).images[0]


def onestill_torch(model: str, steps: int, threads: int | None) -> Draw:
    pipe = onestill.load(model, engine="torch", threads=threads)
    return lambda prompt, seed: pipe(prompt, seed=seed, num_inference_steps=steps).images[0]


def diffusers_pipeline(model: str, steps: int, threads: int | None) -> Draw:
    """As diffusers' documentation has it."""
    import torch
    from diffusers import DiffusionPipeline

    from onestill.checkpoint import resolve

    if threads is not None:
        torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    pipe = DiffusionPipeline.from_pretrained(str(resolve(model).resolve()))
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str, seed: int) -> Any:
        generator = torch.Generator("cpu").manual_seed(seed)
        return pipe(prompt, num_inference_steps=steps, guidance_scale=1.0, generator=generator).images[0]

    return draw


OPENVINO = "onestill openvino "
CONTENDERS: dict[str, Callable[[str, int, int | None], Draw]] = {
    **{OPENVINO + dtype: partial(openvino_in, dtype) for dtype in ("int8", "bfloat16", "float32")},
    "onestill torch": onestill_torch,
    "diffusers": diffusers_pipeline,
}


def contenders(model: str) -> list[str]:
    """The ones that there are for this model on this CPU, with OpenVINO's default first."""
    from onestill.engine.openvino.runtime import shared_core

    pipe = onestill.load(model, engine="openvino")
    default = OPENVINO + pipe.engine.dtype
    int8 = read_int8(pipe.info.path)
    absent = set() if int8 is not None and int8.parts else {OPENVINO + "int8"}
    if "BF16" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        absent.add(OPENVINO + "bfloat16")  # computed in float32, and slower
    return sorted(CONTENDERS.keys() - absent, key=lambda name: (name != default, list(CONTENDERS).index(name)))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load one contender in this process, let it warm up, and time every prompt. Times are milliseconds."""
    started = time.perf_counter()
    draw = CONTENDERS[name](arguments.model, arguments.steps, arguments.threads)
    load_ms = (time.perf_counter() - started) * 1000
    prompts = PROMPTS[arguments.first : arguments.first + arguments.warm_up + arguments.pictures]
    times = []
    for i, prompt in enumerate(prompts):
        started = time.perf_counter()
        draw(prompt, arguments.seed + i)
        if i >= arguments.warm_up:
            times.append((time.perf_counter() - started) * 1000)
    return {"load_ms": load_ms, "times_ms": times}


def measure_elsewhere(name: str, arguments: argparse.Namespace, first: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, "--first", str(first)]
    for option in ("model", "steps", "seed", "pictures", "warm_up", "threads"):
        if getattr(arguments, option) is not None:
            command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cold_start(model: str, seed: int) -> dict[str, float]:
    """Milliseconds of one `onestill generate` as a shell sees it, and what it says of its own parts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "onestill", "generate", COLD_PROMPT, "--seed", str(seed), "--json"]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--model", model, "--out", folder], check=True, stdout=subprocess.PIPE, text=True
        )
        total_ms = (time.perf_counter() - started) * 1000
        return {"shell_ms": total_ms, **json.loads(done.stdout)["timings"]}


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "median_ms": round(statistics.median(ordered), 2),
        "p10_ms": round(ordered[len(ordered) // 10], 2),
        "p90_ms": round(ordered[min(len(ordered) * 9 // 10, len(ordered) - 1)], 2),
        "count": len(ordered),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every contender in turn, `rounds` times, then the cold starts."""
    before = machine()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders(arguments.model)}
    for turn in range(arguments.rounds):
        for name, results in found.items():
            print(f"round {turn + 1} of {arguments.rounds}: {name}", file=sys.stderr)
            results.append(measure_elsewhere(name, arguments, turn * (arguments.warm_up + arguments.pictures)))
    cold_start(arguments.model, arguments.seed)  # fills the cache, as the first start after installing does
    cold = [cold_start(arguments.model, arguments.seed) for _ in range(arguments.cold_starts)]
    words = {name: summary([time for one in results for time in one["times_ms"]]) for name, results in found.items()}
    slowest = words["diffusers"]["median_ms"]
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "model": arguments.model,
        "num_inference_steps": arguments.steps,
        "seed": arguments.seed,
        "machine": before,
        "words_to_pixels": {
            name: {**value, "times_faster_than_diffusers": round(slowest / value["median_ms"], 2)}
            for name, value in words.items()
        },
        "load_ms": {name: round(min(one["load_ms"] for one in results), 1) for name, results in found.items()},
        "cold_shell": {
            part: round(statistics.median(one[part] for one in cold), 1) for part in (cold[0] if cold else {})
        },
    }


def table(report: dict[str, Any]) -> str:
    cpu = report["machine"]["cpu"]
    lines = [f"{report['model']}, {report['num_inference_steps']} step(s), {cpu['name']}, {cpu['cores']} cores"]
    lines += ["", f"{'words to pixels':<28}{'median':>10}{'p10':>10}{'p90':>10}{'load':>12}   faster than diffusers"]
    for name, value in report["words_to_pixels"].items():
        figures = f"{value['median_ms']:>7.1f} ms{value['p10_ms']:>7.1f} ms{value['p90_ms']:>7.1f} ms"
        ratio = value["times_faster_than_diffusers"]
        lines.append(f"{name:<28}{figures}{report['load_ms'][name]:>9.0f} ms   {ratio:.1f}x")
    if report["cold_shell"]:
        parts = ", ".join(f"{part.removesuffix('_ms')} {ms:.0f} ms" for part, ms in report["cold_shell"].items())
        lines += ["", f"onestill generate from a cold shell (medians): {parts}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="icons", help="a shipped model or a folder")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=30, help="per contender and round")
    parser.add_argument("--warm-up", type=int, default=3, help="pictures before those that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold-starts", type=int, default=5)
    parser.add_argument("--threads", type=int, help="for every contender; each chooses its own when left out")
    parser.add_argument("--out", type=Path, help="where to write the report as JSON")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds * (arguments.warm_up + arguments.pictures) > len(PROMPTS):
        parser.error(f"there are {len(PROMPTS)} prompts, and none is drawn twice; ask for fewer pictures")
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments)))
        return
    report = run(arguments)
    print(table(report))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
