"""The shipped model's report: the student at 1, 2 and 4 steps beside its teacher, on captions held out of all training.

    python -m recipes.icons.evaluate --data DATA --teacher FOLDER --student FOLDER --network FOLDER

DATA holds the shards of `render.py`: DATA/val, DATA/style and DATA/concept are read. NETWORK is the contrastive model
that is kept for evaluation; `--also` names others (the discriminator's), whose Fréchet distance shows how far a
metric flatters what was trained against it. What is drawn is saved contender by contender under `--work`: run again
after an interruption and it continues. The teacher's steps take nearly all of the time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import onestill
from onestill.bench.machine import machine_in_words, versions
from onestill.data import ShardReader
from onestill.errors import DataError, OnestillError
from onestill.evaluate import (
    Evaluation,
    Network,
    Protocol,
    Result,
    evaluate,
    fingerprint,
    frechet_ratio,
    load_network,
    name_at,
    pipeline_contender,
)
from onestill.evaluate.protocol import Pictures
from onestill.evaluate.report import sheets
from onestill.evaluate.report.model import About, Report, Sheet, Target, Tried
from onestill.evaluate.report.page import write_report
from recipes.icons.captions import style_name

SPLITS = ("val", "style", "concept")
MOST_DISTANCE_RATIO, MOST_CLIP_LOSS, LEAST_TEACHER_RATIO, LEAST_COLOUR = 1.25, 0.05, 2.0, 0.80
CAVEATS = (
    "Fréchet distance and CLIP score are by a small network that this project trained on the same kind of pictures. "
    "They rank the contenders of this page; they do not compare with figures by Inception or by OpenAI's CLIP, nor "
    "with another number of pictures.",
    "The evaluation network was trained apart from everything that the student was trained against, but on the "
    "same training pictures and with the same frozen text encoder: what that cannot tell apart, no figure here sees.",
    "The real picture of a caption is one of many right answers: the real pictures' own figures are no upper limit.",
    "Captions of the concept split name things that training never showed; they weigh on all figures.",
    "Milliseconds are of whole batches on a machine that may have been doing other work; benchmarks/ measures speed.",
)


TEXTS = {
    "compare": """The first captions of the shuffled held-out set; every contender starts from the same noise. Nothing
        was picked by hand.""",
    "styles": """Training showed each of these things in other styles, and each style with other things, never the two
        together. One step; the real picture of the pair is on the left.""",
    "concepts": """No training caption holds these words. Only the frozen text encoder knows what they are like; expect
        little.""",
    "seeds": "How much a seed changes, in one step and in fifty.",
    "colours": """25 prompts, 4 seeds each, one step. A ring marks a picture in which another colour covers more of the
        foreground.""",
    "failures": """The pictures of the one-step student that have least to do with their captions by the evaluation
        network, worst first.""",
}


@dataclass(frozen=True)
class HeldOut:
    """One held-out sample, its picture still on disk."""

    split: str
    number: int
    caption: str
    icon: str
    style: str


class Pool:
    """The held-out samples of a data folder: one per icon and per caption, in an order that `seed` decides."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.readers: dict[str, ShardReader] = {}
        self._left: dict[str, list[HeldOut]] = {}
        rng = np.random.default_rng(seed)
        icons: set[str] = set()
        captions: set[str] = set()
        for split in SPLITS:
            self.readers[split] = ShardReader(folder / split, shuffle=False, epochs=1)
            index = ShardReader(folder / split, shuffle=False, epochs=1, images=False)
            left = []
            for number in rng.permutation(len(index)):
                sample = index.read(int(number))
                if sample is None or sample.meta["id"] in icons or sample.caption in captions:
                    continue
                icons.add(sample.meta["id"])
                captions.add(sample.caption)
                left.append(HeldOut(split, int(number), sample.caption, sample.meta["id"], sample.meta["style"]))
            self._left[split] = left
        self._rng = rng

    def take(self, count: int) -> list[HeldOut]:
        """Take `count` samples away, the splits as evenly as they last, shuffled."""
        taken: list[HeldOut] = []
        for place, split in enumerate(sorted(SPLITS, key=lambda split: len(self._left[split]))):
            share = (count - len(taken)) // (len(SPLITS) - place)
            taken += self._left[split][:share]
            self._left[split] = self._left[split][share:]
        if len(taken) < count:
            raise DataError(f"only {len(taken)} held-out samples are left where {count} are wanted; ask for fewer.")
        return [taken[i] for i in self._rng.permutation(count)]

    def pictures(self, samples: Sequence[HeldOut], batch_size: int = 64) -> Iterator[Pictures]:
        """Their real pictures in batches uint8 [B, H, W, 3]."""
        for i in range(0, len(samples), batch_size):
            batch = [self.readers[sample.split].read(sample.number) for sample in samples[i : i + batch_size]]
            yield np.stack([sample.image for sample in batch if sample is not None])


def sweep(
    pipeline: onestill.Pipeline, options: argparse.Namespace, pool: Pool, network: Network
) -> tuple[float, str, Tried]:
    """The teacher's guidance scale and sampler of least Fréchet distance, on samples that no other figure uses."""
    samples = pool.take(options.sweep_captions)
    protocol = Protocol(
        prompts=tuple(sample.caption for sample in samples),
        seeds=tuple(range(options.seed + 1_000_000, options.seed + 1_000_000 + len(samples))),
        num_worst=0,
        num_diversity_prompts=0,
        colour_test=None,
        batch_size=options.batch_size,
    )
    tried = [(sampler, guidance) for sampler in options.samplers for guidance in options.guidance]
    contenders = []
    for sampler, guidance in tried:
        one = pipeline_contender(
            pipeline, f"teacher, {sampler}, guidance {guidance:g}", options.sweep_steps, guidance, sampler
        )
        contenders.append(one)
    done = evaluate(
        contenders, protocol, pool.pictures(samples), [network], options.work / "sweep", progress=Progress()
    )
    distances = [result.frechet_distance.value if result.frechet_distance else float("inf") for result in done.results]
    best = int(np.argmin(distances))
    rows = tuple(
        (
            f"{sampler}, guidance {guidance:g}{' (taken)' if i == best else ''}",
            f"{distance:.4g}",
            f"{one.clip_score.value:.2f}",
        )
        for i, ((sampler, guidance), distance, one) in enumerate(zip(tried, distances, done.results, strict=True))
    )
    text = (
        f"{options.sweep_steps} steps over {len(samples)} captions that no other figure uses; the setting of least "
        "Fréchet distance is taken for every number of steps."
    )
    table = Tried("The teacher's guidance scale", text, ("teacher", "Fréchet distance", "CLIP score"), rows)
    return tried[best][1], tried[best][0], table


def protocol_of(samples: Sequence[HeldOut], options: argparse.Namespace) -> Protocol:
    """Everything that all contenders are given alike."""
    named = [style_name(sample.style) for sample in samples]
    asked = tuple(name if name in sample.caption else None for name, sample in zip(named, samples, strict=True))

    def some(count: int, *splits: str) -> tuple[int, ...]:
        # The order of the samples is random already: the first are as good as any, and nobody chose them.
        return tuple(i for i, sample in enumerate(samples) if sample.split in splits)[:count]

    return Protocol(
        prompts=tuple(sample.caption for sample in samples),
        seeds=tuple(range(options.seed, options.seed + len(samples))),
        styles=asked,
        style_names=tuple(sorted({name for name in asked if name})),
        sheets={"compare": some(20, *SPLITS), "styles": some(40, "style"), "concepts": some(20, "concept")},
        num_worst=24,
        batch_size=options.batch_size,
    )


def sheets_of(evaluation: Evaluation, one: str, most: str) -> dict[str, Sheet]:
    texts = {name: " ".join(text.split()) for name, text in TEXTS.items()}
    styles, concepts = "Things in styles they were never trained in", "Things it never saw"
    return {
        "compare": sheets.side_by_side(evaluation, "compare", "The same prompt, the same seed", texts["compare"]),
        "styles": sheets.beside_real(evaluation, "styles", one, styles, texts["styles"]),
        "concepts": sheets.beside_real(evaluation, "concepts", one, concepts, texts["concepts"]),
        "seeds": sheets.several_seeds(evaluation, [one, most], "Four seeds a prompt", texts["seeds"]),
        "colours": sheets.colour_sheet(evaluation, one, "Colours by name", texts["colours"]),
        "failures": sheets.failures(evaluation, one, "Where it fails", texts["failures"]),
    }


def targets_of(evaluation: Evaluation, one: Result, most: Result, weak: Result) -> list[Target]:
    """What the student in one step was to show beside the teacher in most and in one, met or not."""
    ratio, weak_ratio = frechet_ratio(one, most), frechet_ratio(weak, one)
    clip = one.clip_score.value / most.clip_score.value - 1
    found = [
        Target(
            f"one-step student's Fréchet distance over that of the teacher's {most.num_inference_steps} steps",
            f"{ratio.value:.2f}x",
            f"at most {MOST_DISTANCE_RATIO}x",
            ratio.value <= MOST_DISTANCE_RATIO,
            f"{_distance(one):.4g} against {_distance(most):.4g}; 95 % interval {ratio.low:.2f} to {ratio.high:.2f}",
        ),
        Target(
            f"one-step student's CLIP score beside the teacher's at {most.num_inference_steps} steps",
            f"{100 * clip:+.1f} %",
            f"at most {100 * MOST_CLIP_LOSS:.0f} % lower",
            clip >= -MOST_CLIP_LOSS,
            f"{one.clip_score.value:.2f} against {most.clip_score.value:.2f}; "
            f"real pictures {evaluation.real.clip_score.value:.2f}",
        ),
        Target(
            "the teacher's Fréchet distance in one step over the student's",
            f"{weak_ratio.value:.1f}x",
            f"at least {LEAST_TEACHER_RATIO:g}x",
            weak_ratio.value >= LEAST_TEACHER_RATIO,
            f"{_distance(weak):.4g} against {_distance(one):.4g}",
        ),
    ]
    if one.colour and most.colour:
        missed = max(0.0, LEAST_COLOUR - one.colour.value)
        note = f"missed by {100 * missed:.0f} points; " if missed else ""
        found.append(
            Target(
                "the named colour dominates, one step",
                f"{100 * one.colour.value:.0f} %",
                f"at least {100 * LEAST_COLOUR:.0f} %",
                not missed,
                f"{note}{len(one.colour_verdicts)} pictures; {most.name} {100 * most.colour.value:.0f} %",
            )
        )
    return found


def _distance(result: Result) -> float:
    return result.frechet_distance.value if result.frechet_distance else float("nan")


class Progress:
    """One line on standard error, overwritten, where that is a terminal; a line a contender where it is not."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        began = self._started.setdefault(name, time.monotonic())
        last = done == total
        if last or sys.stderr.isatty():
            line = f"{name}: {done}/{total} pictures, {time.monotonic() - began:.0f} s"
            print(f"\r{line}", end="\n" if last else "", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with val/, style/ and concept/ shards")
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher in diffusers' format")
    parser.add_argument("--student", type=Path, required=True, help="the student in diffusers' format")
    parser.add_argument("--network", type=Path, required=True, help="the evaluation-only contrastive model")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="other contrastive models")
    parser.add_argument("--out", type=Path, default=Path("recipes/icons/report"))
    parser.add_argument("--work", type=Path, default=Path("runs/evaluate"), help="where samples are saved")
    parser.add_argument("--teacher-steps", type=int, nargs="+", default=[1, 2, 4, 25, 50], help="1 first, most last")
    parser.add_argument("--student-steps", type=int, nargs="+", default=[1, 2, 4], help="1 first")
    parser.add_argument("--captions", type=int, default=2001, help="held-out captions, a third from each split")
    parser.add_argument("--sweep-captions", type=int, default=300)
    parser.add_argument("--sweep-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 5.0])
    parser.add_argument("--samplers", nargs="+", default=["ddim"], help="the teacher's samplers to try")
    parser.add_argument("--engine", choices=("openvino", "torch"))
    parser.add_argument("--device", help="default: auto, a GPU where torch has one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tried", type=Path, help="JSON list of {title, text, heads, rows}: what else was tried")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Path:
    began = time.monotonic()
    loading = {"engine": options.engine, "device": options.device, "dtype": options.dtype, "threads": options.threads}
    teacher = onestill.load(options.teacher, **loading)
    student = onestill.load(options.student, **loading)
    pool = Pool(options.data, options.seed)
    paths = (options.network, *options.also)
    networks = [load_network(path, options.student, device=options.device) for path in paths]
    samples = pool.take(options.captions)
    others = pool.take(options.captions)
    guidance, sampler, tried = sweep(teacher, options, pool, networks[0])
    contenders = [pipeline_contender(teacher, "teacher", steps, guidance, sampler) for steps in options.teacher_steps]
    contenders += [
        pipeline_contender(student, "student", steps, 1.0, student.info.sampler) for steps in options.student_steps
    ]
    evaluation = evaluate(
        contenders,
        protocol_of(samples, options),
        pool.pictures(samples),
        networks,
        options.work / "contenders",
        floor=pool.pictures(others),
        progress=Progress(),
    )
    more = [_tried_of(one) for one in json.loads(options.tried.read_text(encoding="utf-8"))] if options.tried else []
    last = options.teacher_steps[-1]
    counts = ", ".join(f"{sum(sample.split == split for sample in samples)} {split}" for split in SPLITS)
    about = About(
        title=f"One step against {last}",
        lead=f"The model '{student.info.name}' in one step beside its teacher in {last}: "
        f"{len(samples):,} captions that no training saw, from the same seeds, nothing picked by hand."
        f"{_decoders(teacher, student)}",
        sets={
            "prompts": f"{len(samples):,} captions of held-out icons, one each: {counts}",
            "reference": "the real pictures of those captions",
            "floor": f"{len(others):,} other held-out pictures",
            "networks": ", ".join(f"{network.name} ({network.fingerprint})" for network in networks),
            "teacher": f"{options.teacher.name} ({fingerprint(teacher.info)}), {sampler}, guidance {guidance:g}",
            "student": f"{options.student.name} ({fingerprint(student.info)}), {student.info.sampler}, no guidance",
            "engine": f"{teacher.engine.name}, {teacher.engine.dtype}, {teacher.engine.device}",
            "took": f"{(time.monotonic() - began) / 60:.1f} minutes, less what an earlier run had drawn",
        },
        command="python -m recipes.icons.evaluate " + shlex.join(_without_folders(options)),
        seed=options.seed,
        machine=machine_in_words(),
        versions=versions(),
        caveats=CAVEATS,
    )
    one, most = name_at("student", options.student_steps[0]), name_at("teacher", last)
    weak = evaluation.result(name_at("teacher", options.teacher_steps[0]))
    targets = targets_of(evaluation, evaluation.result(one), evaluation.result(most), weak)
    report = Report(about, evaluation, targets, sheets_of(evaluation, one, most), [tried, *more], hero=one)
    return write_report(report, options.out)


def _decoders(*both: onestill.Pipeline) -> str:
    teacher, student = (f"{one.info.width} x {one.info.height} px" for one in both)
    both_sizes = f" The teacher draws {teacher} by a decoder of its own, the student {student} by another"
    return "" if teacher == student else f"{both_sizes}: what sets them apart is the decoders' as well."


def _tried_of(fields: dict[str, Any]) -> Tried:
    return Tried(fields["title"], fields["text"], tuple(fields["heads"]), tuple(tuple(row) for row in fields["rows"]))


def _without_folders(options: argparse.Namespace) -> list[str]:
    """The command's arguments with folders by their names alone: a report tells no one's directory tree."""
    words: list[str] = []
    for name, value in vars(options).items():
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *(one.name if isinstance(one, Path) else str(one) for one in values)]
    return words


def show(make: Callable[[], Path]) -> None:
    """Print the path of the page that `make` writes; a user's mistake is one line and an exit status."""
    try:
        print(make())
    except OnestillError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None


def main(arguments: Sequence[str] | None = None) -> None:
    show(lambda: run(parse(arguments)))


if __name__ == "__main__":
    main()
