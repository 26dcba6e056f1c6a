"""What each way to be fast brings on a GPU, alone and on top of those that helped; and whether it changes the picture.

    python -m benchmarks.ladder --random sdxl --out benchmarks/results/ladder.json

The first rung is the plain engine on the device, one call after the other. "alone" is a rung on top of that one;
"together" on top of all rungs before it that were measured and made a picture sooner: what was left out, refused or
slower is not carried on. Every picture is compared with the plain engine's by the same decoder. The figure beside a
time is its multiple of the floor. Each measurement is a process of its own; one that fails leaves all that it said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onestill.bench.latency import measure_elsewhere, psnr
from onestill.bench.machine import machine
from onestill.bench.setting import Setting
from onestill.checkpoint import resolve
from onestill.cli.console import note
from onestill.engine.protocol import TorchOptions
from onestill.errors import OnestillError
from onestill.export.random_models import cached_random_model

Options = Mapping[str, Any]
Measure = Callable[[Setting], Mapping[str, Any]]  # raises OnestillError where it cannot be had

KNOWN = {option.name for option in dataclasses.fields(TorchOptions)}
PLAIN: Options = {name: False for name in ("graphs", "channels_last", "fuse", "cudnn_benchmark") if name in KNOWN}


@dataclass(frozen=True)
class Rung:
    """One way to be fast.

    Attributes:
        options: what it asks of `TorchOptions`.
        tiny: whether it is the tiny decoder.
        needs: options that it is never measured without.
        dtype: the one type that it is to be had in, where there is but one.
    """

    options: Options = field(default_factory=dict)
    tiny: bool = False
    needs: Options = field(default_factory=dict)
    dtype: str | None = None


RUNGS: dict[str, Rung] = {
    "plain": Rung(),
    "tiny VAE": Rung(tiny=True),
    "CUDA graphs": Rung({"graphs": True}),
    "fused projections": Rung({"fuse": True}),
    "attention by cuDNN": Rung({"attention": "cudnn"}),
    "attention by flash": Rung({"attention": "flash"}),
    "attention by efficient": Rung({"attention": "efficient"}),
    "cuDNN benchmark": Rung({"cudnn_benchmark": True}),
    "channels last": Rung({"channels_last": True}),
    "compiled blocks": Rung({"compile": "regional"}),
    "compiled blocks, channels last": Rung({"compile": "regional", "channels_last": True}),
    "compiled whole": Rung({"compile": "whole"}),
    # Quantised layers that are not compiled are many times slower.
    "int8": Rung({"quantize": "int8", "attention": None}, needs={"compile": "regional"}),
    "fp8": Rung({"quantize": "fp8", "attention": None}, needs={"compile": "regional"}, dtype="bfloat16"),
}
KINDS = ("alone", "together")
REPORTED = (
    *("options", "batch", "device", "dtype", "dtypes", "pictures", "load_ms", "first_ms", "encode_ms", "denoise_ms"),
    *("decode_ms", "total_ms", "cached_ms", "images_per_second", "peak_memory_mb", "gflop", "tflops", "floor_ms"),
    *("floor_multiple", "parts_by_events_ms"),
)


class Ladder:
    """Climbs the rungs; each result is handed on as soon as it is there.

    Args:
        base: what is asked for on every rung.
        tiny: a folder with a tiny decoder, or None.
        measure: measures one setting.
        scratch: a folder for the pictures.
        results: rung -> "alone" and "together" -> what was measured, or `refused` and all that was said.
        written: called after each result.
    """

    def __init__(
        self,
        base: Setting,
        tiny: str | None,
        measure: Measure,
        scratch: Path,
        results: dict[str, Any],
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self.base, self.tiny, self.results = base, tiny, results
        self._measure, self._scratch, self._written = measure, scratch, written
        self.carried: dict[str, Any] = dict(PLAIN)
        self.carries_tiny = False
        self.fastest_ms = float("inf")
        self.references: dict[bool, tuple[str, Path]] = {}  # whether the decoder is tiny -> dtype and picture

    def setting(self, rung: Rung, kind: str) -> Setting:
        """What a rung asks for: alone, or on top of all that helped before it."""
        together = kind == "together"
        options = {**rung.needs, **(self.carried if together else PLAIN), **rung.options}
        tiny = rung.tiny or (together and self.carries_tiny)
        dtype = rung.dtype or self.base.dtype
        return replace(self.base, options=options, tiny_vae=self.tiny if tiny else None, dtype=dtype)

    def climb(self, names: Collection[str], kinds: Collection[str] = KINDS, ends: float = float("inf")) -> None:
        """Measure the rungs of these names in the order of `RUNGS`, until `time.monotonic()` says `ends`."""
        for name, rung in RUNGS.items():
            if name not in names:
                continue
            for kind in ("together",) if name == "plain" else kinds:
                why = self._left_out(rung, ends)
                found = {"refused": why} if why else self._measured(name, rung, kind)
                self.results.setdefault(name, {})[kind] = found
                self._written()

    def _left_out(self, rung: Rung, ends: float) -> str | None:
        unknown = sorted({*rung.options, *rung.needs} - KNOWN)
        if unknown:
            return f"This version of onestill has no option '{unknown[0]}' to measure."
        if rung.tiny and self.tiny is None:
            return "There is no tiny decoder to measure with; give --tiny-vae FOLDER."
        if time.monotonic() > ends:
            return "The time was up before this rung; give more of it, or leave out others with --skip."
        return None

    def _measured(self, name: str, rung: Rung, kind: str) -> dict[str, Any]:
        picture = self._scratch / f"{name}-{kind}.png".replace(" ", "-").replace(",", "")
        setting = replace(self.setting(rung, kind), picture=str(picture))
        try:
            measured = self._measure(setting)
        except OnestillError as error:
            return {"refused": str(error), "stderr": getattr(error, "stderr", "")}
        found = shown(setting, measured)
        total_ms = measured["total_ms"]["p50"]
        print(name, kind, total_ms, "ms", file=sys.stderr, flush=True)
        found |= self._beside_reference(setting, measured["dtype"], picture)
        if kind == "together":
            found["carried_on"] = total_ms < self.fastest_ms
            if found["carried_on"]:
                self.fastest_ms, self.carries_tiny = total_ms, setting.tiny_vae is not None
                self.carried = dict(setting.options or {})
        return found

    def _beside_reference(self, setting: Setting, dtype: str, picture: Path) -> dict[str, Any]:
        """How near a picture is to the plain engine's by the same decoder, which the first of each decoder is."""
        tiny = setting.tiny_vae is not None
        if tiny not in self.references and setting.options == PLAIN:
            self.references[tiny] = (dtype, picture)
        if tiny not in self.references or not picture.is_file():
            return {"psnr_db": None, "reference": None}
        of, reference = self.references[tiny]
        decibels = psnr(picture, reference)
        return {"psnr_db": decibels, "equal": decibels is None, "reference": f"plain, the same decoder, {of}"}


def shown(setting: Setting, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What is reported of a measurement: no path, and by which decoder."""
    return {
        "decoder": "the model's VAE" if setting.tiny_vae is None else "tiny VAE",
        **{key: measured[key] for key in REPORTED if key in measured},
    }


class Floors:
    """Adds the floor to results. What is counted and how fast the device multiplies is found once for all of them."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Any, ...], dict[str, float]] = {}
        self._rates: dict[tuple[str, str], float] = {}

    def __call__(self, setting: Setting, result: Mapping[str, Any]) -> dict[str, Any]:
        """The result with `gflop` by part, `tflops`, `floor_ms` and `floor_multiple`."""
        from onestill.bench.roofline import count_gflop, matrix_tflops
        from onestill.checkpoint import Additions, describe, resolve

        tiny = Additions(tiny_vae=Path(setting.tiny_vae) if setting.tiny_vae else None)
        info = describe(resolve(setting.model), tiny)
        size = (setting.height or info.height, setting.width or info.width)
        key = (setting.model, setting.tiny_vae, *size)
        if key not in self._counts:
            self._counts[key] = count_gflop(info, batch=1, height=size[0], width=size[1])
        rate = (result["device"], result["dtype"])
        if rate not in self._rates:
            self._rates[rate] = matrix_tflops(*rate)
        # Counting takes seconds; of several pictures it gives as many times that of one, to the fifth digit.
        gflop = {part: setting.batch * count for part, count in self._counts[key].items()}
        gflop["unet"] *= setting.steps or info.num_inference_steps
        floor_ms = sum(gflop.values()) / self._rates[rate]
        return {
            **result,
            "gflop": {part: round(count, 1) for part, count in gflop.items()},
            "tflops": round(self._rates[rate], 3),
            "floor_ms": round(floor_ms, 3),
            "floor_multiple": round(result["total_ms"]["p50"] / floor_ms, 2),
        }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every rung that there is time for; the report is written after each, as a lent machine may go."""
    ends = time.monotonic() + 60 * arguments.minutes
    at = cached_random_model(arguments.random, note) if arguments.random else resolve(arguments.model)
    base = Setting(
        "onestill", str(at), engine="torch", device=arguments.device, dtype=arguments.dtype, pictures=arguments.pictures
    )
    report: dict[str, Any] = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "model": f"random-{arguments.random}" if arguments.random else arguments.model,
        "random_weights": arguments.random is not None,
        "machine": machine(),
        "results": {},
    }
    floors = Floors()

    def measure(setting: Setting) -> Mapping[str, Any]:
        return floors(setting, measure_elsewhere(setting, most_s=max(ends - time.monotonic(), 1)))

    with tempfile.TemporaryDirectory() as scratch:
        tiny = str(at / "tiny_vae") if arguments.random else arguments.tiny_vae
        written = lambda: write(report, arguments.out)  # noqa: E731
        ladder = Ladder(base, tiny, measure, Path(scratch), report["results"], written)
        ladder.climb([name for name in RUNGS if name not in arguments.skip], arguments.kinds, ends)
    return report


def write(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="icons")
    parser.add_argument("--random", choices=("sdxl", "sd21"), help="random weights at real size, made once")
    parser.add_argument("--tiny-vae", help="a folder with TAESD or TAESDXL; --random brings its own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--skip", nargs="*", default=[], choices=[name for name in RUNGS if name != "plain"])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--minutes", type=float, default=60, help="rungs that are not done by then are refused")
    parser.add_argument("--out", type=Path)
    print(json.dumps(run(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
