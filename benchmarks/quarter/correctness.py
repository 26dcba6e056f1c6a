"""Is what is fast also right? On small models of SDXL's architecture, graphs against the same calls run eagerly.

Where there is no GPU there are no graphs: the fast engine's plain calls are then held against the plain engine's, and
the record says so under `twin`.
"""

from __future__ import annotations

import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch

from benchmarks.quarter.limits import OverranError
from benchmarks.quarter.networks import SMALL, RandomNetworks
from benchmarks.quarter.steps import Run
from onestill.bench.setting import Setting
from onestill.errors import NotEnoughMemoryError
from onestill.pipeline import Pipeline

__all__ = ["correctness"]

PROMPTS = ("a red apple", "a green heart", "a bicycle", "a blue star", "a white house", "a cat", "a key", "a bell")
LEVELS = 3  # of 255 that a picture may be off: a GPU's kernels differ with the batch
SETTINGS: Mapping[str, dict[str, Any]] = {
    "1 image": {"count": 1},
    "3 images, 3 steps": {"count": 3, "num_inference_steps": 3},
    "8 images": {"count": 8},
    "guidance": {"count": 2, "num_inference_steps": 2, "guidance_scale": 2.0},
    "guidance away from words": {
        "count": 1,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "negative_prompt": "a star",
    },
    "another size": {"count": 1, "height": 72, "width": 80},
    "image to image": {
        "count": 1,
        "num_inference_steps": 2,
        "image": PIL.Image.new("RGB", (64, 64), "orange"),
        "strength": 0.5,
    },
}
THREADS = 8


class Twins:
    """The engine as it is fast, and as it is sure to be right, on the same networks."""

    def __init__(self, networks: RandomNetworks, on_gpu: bool) -> None:
        base = Setting("onestill", str(networks.folder), dtype="float32")
        self.networks, self.uses = networks, 3 if on_gpu else 1
        options = {"channels_last": False, "fuse": True}
        self.fast = networks.pipeline(_with(base, {"graphs": True, **options}))
        self.sure = networks.pipeline(_with(base, {"graphs": False, "fuse": False} if on_gpu else None))


def _with(setting: Setting, options: Mapping[str, Any] | None) -> Setting:
    return Setting(setting.contender, setting.model, dtype=setting.dtype, options=options)


def correctness(run: Run, seconds: float, note: Callable[..., None]) -> Mapping[str, Any]:
    """All checks, each in its own `try`.

    Raises:
        AssertionError: some failed; their tracebacks are in the record.
        OverranError: the time was up before the last one.
    """
    ends = time.monotonic() + seconds
    networks = RandomNetworks(run.work / f"small-{time.time_ns()}", run.device, SMALL, torch.float32)
    twins = Twins(networks, run.on_gpu)
    checks: dict[str, Any] = {}
    twin = "CUDA graphs against the same calls run eagerly" if run.on_gpu else "no GPU: the fast engine's plain calls"
    todo: dict[str, Callable[[Twins], Any]] = {
        **{f"equal, {name}": _equal(given) for name, given in SETTINGS.items()},
        **({"equal to a CPU's": as_on_a_cpu} if run.on_gpu else {}),
        "the same again": same_again,
        f"{THREADS} threads": threads,
        "an overflow is decoded again": overflow,
        "out of memory, then on": out_of_memory if run.on_gpu else out_of_memory_on_cpu,
    }
    for name, check in todo.items():
        if time.monotonic() > ends:  # where libraries swallowed the alarm
            raise OverranError(f"the time was up before the check '{name}'; give it more.")
        began = time.perf_counter()
        try:
            checks[name] = {"ok": True, "found": check(twins)}
        except Exception:
            checks[name] = {"ok": False, "traceback": traceback.format_exc()}
        checks[name]["took_s"] = round(time.perf_counter() - began, 2)
        note(twin=twin, checks=checks)
    failed = [name for name, one in checks.items() if not one["ok"]]
    assert not failed, f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}"
    return {}


def levels(pipe: Pipeline, count: int = 1, **given: Any) -> Any:
    """Pictures int16 [N, H, W, 3] of the first `count` prompts."""
    images = pipe(list(PROMPTS[:count]), seed=7, **given).images
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def _equal(given: Mapping[str, Any]) -> Callable[[Twins], str]:
    def check(twins: Twins) -> str:
        # On a GPU three times, as the first use of a shape may run eagerly, the second be captured, the third replayed.
        for _ in range(twins.uses):
            found, expected = levels(twins.fast, **given), levels(twins.sure, **given)
            off = int(np.abs(found - expected).max())
            assert off <= LEVELS, f"a picture is {off} levels off"
        assert expected.std() > 1, "the picture is of one colour, so that this says nothing"
        return f"at most {off} levels off"

    return check


def as_on_a_cpu(twins: Twins) -> str:
    """The GPU's picture is the CPU's, whose kernels are others."""
    setting = _with(Setting("onestill", str(twins.networks.folder), dtype="float32"), None)
    off = int(np.abs(levels(twins.fast, 3) - levels(twins.networks.on("cpu").pipeline(setting), 3)).max())
    assert off <= LEVELS, f"a picture is {off} levels off"
    return f"at most {off} levels off"


def same_again(twins: Twins) -> str:
    """A replay draws what it drew before others came between."""
    first = levels(twins.fast, 3)
    levels(twins.fast, 8)
    levels(twins.fast, 1, num_inference_steps=3)
    off = int(np.abs(levels(twins.fast, 3) - first).max())
    assert off == 0, f"the second time a picture is {off} levels off"
    return "equal to the last level"


def threads(twins: Twins) -> str:
    """Each of several threads gets its own pictures."""
    alone = [levels_of(twins.sure, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    wrong: list[str] = []

    def ask(thread: int) -> None:
        try:
            for i in range(2 * twins.uses):
                at = (3 * thread + i) % len(PROMPTS)
                if np.abs(levels_of(twins.fast, PROMPTS[at], at) - alone[at]).max() > LEVELS:
                    wrong.append(f"thread {thread}, '{PROMPTS[at]}'")
        except Exception:
            wrong.append(traceback.format_exc())

    asking = [threading.Thread(target=ask, args=(i,)) for i in range(THREADS)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert not wrong, "; ".join(wrong[:3])
    return f"{THREADS * 2 * twins.uses} pictures, each its own"


def levels_of(pipe: Pipeline, prompt: str, seed: int) -> Any:
    """One picture, int16 [H, W, 3]."""
    return np.asarray(pipe(prompt, seed=seed).images[0], dtype=np.int16)


def overflow(twins: Twins) -> str:
    """A decoder whose numbers leave float16's range: the picture comes from float32, and that is said."""
    pipe = twins.networks.pipeline(_with(Setting("onestill", "", dtype="float32"), {"graphs": True}))
    decoder: Any = pipe.engine._networks.latent_space.decoder  # type: ignore[attr-defined]
    decoder.to(torch.float16)
    with torch.no_grad():
        decoder.decoder.conv_in.weight *= 1e4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        picture = levels_of(pipe, PROMPTS[0], 1)
    assert any("decoded in float32" in str(one.message) for one in caught), "nobody said that it overflowed"
    assert picture.std() > 1, "the picture is black or of one colour"
    return "decoded in float32, with a warning"


def out_of_memory(twins: Twins) -> str:
    """A GPU with next to nothing left refuses in one sentence, and draws again when it has more."""
    before = levels(twins.fast, 1)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    del free
    taken = torch.cuda.memory_reserved()
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (taken + 64 * 2**20) / total))
        try:
            levels(twins.fast, 8, height=2048, width=2048)
        except NotEnoughMemoryError as error:
            said = str(error)
        else:
            raise AssertionError("eight pictures of 2048 px fitted into 64 MiB")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    off = int(np.abs(levels(twins.fast, 1) - before).max())
    assert off <= LEVELS, f"afterwards a picture is {off} levels off"
    return said


def out_of_memory_on_cpu(twins: Twins) -> str:
    """The CPU's twin: there is no share of its memory to set, so an allocation that no machine has is made inside."""
    before = levels(twins.fast, 1)
    engine: Any = twins.fast.engine
    space = engine._networks.latent_space
    whole = space.decode
    space.decode = lambda latents: torch.empty(2**60, dtype=torch.float32)
    try:
        levels(twins.fast, 1)
    except NotEnoughMemoryError as error:
        said = str(error)
    else:
        raise AssertionError("an exabyte fitted into memory")
    finally:
        space.decode = whole
    assert np.array_equal(levels(twins.fast, 1), before), "afterwards the picture is another"
    return said
