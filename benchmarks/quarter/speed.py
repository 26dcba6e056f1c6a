"""SDXL's size in one process: the ladder's rungs, batches, and diffusers on the same networks in the same type.

All is measured in bfloat16, where no part of either program is cast, so that a comparison changes one thing; then ours
once in float16. Beside each time stand its floor, by operations, and how long reading the weights alone takes.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ladder import Floors, Ladder, shown
from benchmarks.quarter.limits import OverranError, limited
from benchmarks.quarter.networks import SMALL, RandomNetworks
from benchmarks.quarter.steps import Run
from onestill.bench.contenders import diffusers_contender, diffusers_pipeline, our_contender
from onestill.bench.latency import MeasuringError, measure, percentile, psnr
from onestill.bench.setting import PARTS, Setting
from onestill.checkpoint import describe

__all__ = ["compiled", "speed"]

FIRST = ("plain", "tiny VAE", "CUDA graphs", "fused projections")
LATER = ("attention by cuDNN", "attention by flash", "attention by efficient", "cuDNN benchmark", "channels last")
COMPILED = ("compiled blocks", "compiled blocks, channels last", "compiled whole")
BATCHES = (2, 4, 8)
NEED_CUDA = ("attention by cuDNN", "attention by efficient")  # and have no twin on a CPU
EACH_S = 15.0  # that one measurement may take before it is stopped
COMPILED_S = 240.0  # a compilation with all tuning
COUNTED_S = 6.0  # that the calls that count may take
PICTURES = 30  # that count


class Measuring:
    """Measures settings in this process, on copies of one set of networks, and keeps what was found.

    Args:
        run: the run.
        note: writes facts of the step.
        ends: when no further measurement begins, by `time.monotonic()`.
    """

    def __init__(self, run: Run, note: Callable[..., None], ends: float) -> None:
        self.run, self.note, self.ends = run, note, ends
        if "networks" not in run.shared:
            folder = run.work / f"networks-{time.time_ns()}"
            run.shared["networks"] = RandomNetworks(folder, run.device, None if run.on_gpu else SMALL)
        self.networks: RandomNetworks = run.shared["networks"]
        self.floors: Floors = run.shared.setdefault("floors", Floors())
        self.scratch = Path(run.work / f"pictures-{time.time_ns()}")
        self.scratch.mkdir()
        self.results: dict[str, Any] = {}
        model = str(self.networks.folder)
        if run.on_gpu:
            times = {"warm_up": 3, "pictures": PICTURES, "repeats": 3}
        else:
            times = {"warm_up": 0, "pictures": 1, "repeats": 0}
        dtype = "bfloat16" if run.on_gpu else "float32"
        self.base = Setting("onestill", model, engine="torch", device=run.device, dtype=dtype, **dict[str, Any](times))
        self.ladder = Ladder(
            self.base, self.networks.tiny_vae, self.ours, self.scratch, self.results, lambda: note(results=self.results)
        )
        self.each_s = EACH_S

    def ours(self, setting: Setting) -> Mapping[str, Any]:
        """Ours as a setting asks for it, with the parts as the GPU's own events tell them."""
        with self._limited(setting):
            found = self._ours(setting)
        return self.floors(setting, found)

    def _ours(self, setting: Setting) -> Mapping[str, Any]:
        pipe = self.networks.pipeline(setting if self.run.on_gpu else cpu_twin(setting))
        events = Events(pipe)
        found = measure(setting, loaded=our_contender(pipe, setting), most_s=COUNTED_S)
        return {**found, "parts_by_events_ms": events.medians(setting.warm_up)}

    def theirs(self, name: str, setting: Setting) -> None:
        """diffusers as a setting asks for it, into the results, beside ours that has all the same settings."""
        picture = self.scratch / f"{name}.png".replace(" ", "-").replace(",", "")
        asked = replace(setting, picture=str(picture), options=None)
        try:
            with self._limited(asked):
                found = self._theirs(asked)
            found = self.floors(asked, found)
        except MeasuringError as error:
            self.results[name] = {"refused": str(error), "stderr": error.stderr}
        else:
            reference = self.ladder.references.get(asked.tiny_vae is not None)
            near = psnr(picture, reference[1]) if reference and picture.is_file() else None
            self.results[name] = {**shown(asked, found), "psnr_db_to_ours_plain": near}
        self.note(results=self.results)

    def _theirs(self, setting: Setting) -> Mapping[str, Any]:
        twin = setting if self.run.on_gpu else replace(setting, contender="diffusers")
        pipe = diffusers_pipeline(self.networks.diffusers_pipeline(twin), twin)
        loaded = diffusers_contender(pipe, twin, describe(self.networks.folder))
        return measure(setting, loaded=loaded, most_s=COUNTED_S)

    def batches(self) -> None:
        """What was fastest for one picture, for several; with the tiny decoder and with the model's own."""
        for tiny in (self.networks.tiny_vae, None):
            for batch in BATCHES if self.run.on_gpu else BATCHES[:1]:
                name = f"batch {batch}, {'tiny' if tiny else 'full'} VAE"
                setting = replace(self.base, options=self.ladder.carried, tiny_vae=tiny, batch=batch)
                self.one(name, replace(setting, pictures=min(self.base.pictures, 10)))

    def one(self, name: str, setting: Setting) -> None:
        """One more of ours, into the results."""
        try:
            if time.monotonic() > self.ends:
                raise MeasuringError("The time was up before it.")
            self.results[name] = shown(setting, self.ours(setting))
        except MeasuringError as error:
            self.results[name] = {"refused": str(error), "stderr": error.stderr}
        self.note(results=self.results)

    @contextmanager
    def _limited(self, setting: Setting) -> Iterator[None]:
        """Whatever fails in the body fails that measurement alone, with its traceback."""
        try:
            with limited(min(self.each_s, self.ends - time.monotonic()), f"measuring {setting.contender}"):
                yield
        except Exception as error:
            sentence = str(error) if isinstance(error, OverranError) else f"Measuring failed: {error}."
            all_of_it = traceback.format_exc()
            traceback.clear_frames(error.__traceback__)  # which hold the networks, and so the GPU's memory
            raise MeasuringError(sentence, all_of_it) from None
        finally:
            gc.collect()  # engines are full of circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class Events:
    """Listens to what an engine says of its own parts: on a GPU, milliseconds between events on its stream."""

    def __init__(self, pipe: Any) -> None:
        self._drawn: list[dict[str, float]] = []
        engine = pipe.engine
        if not hasattr(engine, "draw"):
            return
        draw = engine.draw

        def listened(job: Any) -> Any:
            drawn = draw(job)
            self._drawn.append({part: getattr(drawn, part) for part in PARTS[:3]})
            return drawn

        engine.draw = listened

    def medians(self, after: int) -> dict[str, float]:
        """Of the calls after the first so many."""
        counted = self._drawn[after:]
        return {part: round(percentile([one[part] for one in counted], 50), 3) for part in PARTS[:3] if counted}


def speed(run: Run, seconds: float, note: Callable[..., None]) -> Mapping[str, Any]:
    """Everything but compiling, what matters most first.

    Raises:
        AssertionError: some contenders failed; their tracebacks are in the record.
    """
    measuring = Measuring(run, note, time.monotonic() + seconds)
    note(weights=read_ms(run, measuring.networks), twin=None if run.on_gpu else "no GPU: graphs are plain calls")
    ladder, tiny = measuring.ladder, measuring.networks.tiny_vae
    ladder.climb(FIRST, ("together",), measuring.ends)
    theirs = replace(measuring.base, contender="diffusers", options=None)
    measuring.theirs("diffusers, tiny VAE", replace(theirs, tiny_vae=tiny))
    measuring.theirs("diffusers, full VAE", theirs)
    measuring.one("fastest so far, full VAE", replace(measuring.base, options=ladder.carried))
    here = [name for name in LATER if run.on_gpu or name not in NEED_CUDA]
    measuring.results |= {name: {"refused": "It needs a GPU."} for name in LATER if name not in here}
    ladder.climb(here, ("together",), measuring.ends)
    measuring.batches()
    if run.on_gpu:
        fastest = replace(measuring.base, options=ladder.carried, tiny_vae=tiny)
        measuring.one("float16, tiny VAE", replace(fastest, dtype="float16"))
    return finished(measuring)


def compiled(run: Run, seconds: float, note: Callable[..., None]) -> Mapping[str, Any]:
    """The compiled forms, the cheap one first; then diffusers' own compiled recipe.

    Raises:
        AssertionError: some contenders failed; their tracebacks are in the record.
    """
    measuring = Measuring(run, note, time.monotonic() + seconds)
    note(
        twin=None if run.on_gpu else "no GPU: nothing is compiled, as C++ takes a CPU minutes; the same calls are made"
    )
    measuring.ladder.climb(FIRST, ("together",), measuring.ends)
    measuring.each_s = COMPILED_S
    measuring.ladder.climb(COMPILED, ("together",), measuring.ends)
    theirs = replace(measuring.base, contender="diffusers compiled", tiny_vae=measuring.networks.tiny_vae)
    measuring.theirs("diffusers compiled, tiny VAE", theirs)
    measuring.one("compiled, full VAE", replace(measuring.base, options=measuring.ladder.carried))
    return finished(measuring)


def finished(measuring: Measuring) -> Mapping[str, Any]:
    """What ours is faster by, where both drew with the same decoder; and what failed."""
    measuring.note(times_faster=faster(measuring.results))
    failed = [name for name, one in flat(measuring.results).items() if "Traceback" in one.get("stderr", "")]
    assert not failed, f"{len(failed)} measurements failed: {'; '.join(failed)}"
    return {}


def faster(results: Mapping[str, Any]) -> dict[str, float]:
    """Each of diffusers' times over the best of ours for one picture, by the same decoder and in the same type."""
    best: dict[tuple[str, str], float] = {}
    theirs: dict[str, tuple[tuple[str, str], float]] = {}
    for name, one in flat(results).items():
        if one.get("batch") != 1:
            continue
        alike, total_ms = (one["decoder"], one["dtype"]), one["total_ms"]["p50"]
        if name.startswith("diffusers"):
            theirs[name] = (alike, total_ms)
        else:
            best[alike] = min(total_ms, best.get(alike, total_ms))
    return {name: round(total_ms / best[alike], 2) for name, (alike, total_ms) in theirs.items() if alike in best}


def flat(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> result; the ladder's are one level deeper."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, one in results.items():
        inner = {kind: one[kind] for kind in ("alone", "together") if kind in one}
        found |= {f"{name}, {kind}": value for kind, value in inner.items()} or {name: one}
    return found


def cpu_twin(setting: Setting) -> Setting:
    """What a CPU can do of a setting: all but compiling."""
    return replace(
        setting, options={name: value for name, value in (setting.options or {}).items() if name != "compile"}
    )


def read_ms(run: Run, networks: RandomNetworks) -> Mapping[str, Any]:
    """How large each network is, and how long a GPU takes to read it once: the other floor of a single picture."""
    rate = run.shared.get("copy_gb_per_s")
    sizes = {
        name: sum(one.numel() * one.element_size() for one in part.parameters()) / 1e9
        for name, part in networks.parts.items()
    }
    return {
        name: {"gb": round(size, 3), "read_ms": round(1000 * size / rate, 3) if rate else None}
        for name, size in sizes.items()
    }
