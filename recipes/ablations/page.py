"""What a block of ablations found, as a page with pictures, a JSON file and a Markdown table."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from onestill.bench.machine import machine_in_words, versions
from onestill.evaluate import Evaluation, Result, frechet_ratio
from onestill.evaluate.report import sheets
from onestill.evaluate.report.model import About, Report, Target, Tried
from onestill.evaluate.report.page import write_report
from recipes.ablations.block import Block, Trained

CAVEATS = (
    "These runs are short and the model is small: they say what a loss does for the icons in this time, and nothing of "
    "what the paper's 4,000 iterations of 128 do for Stable Diffusion.",
    "Fréchet distance and CLIP score are by a small network that this project trained on pictures of the same kind and "
    "that no row was trained against. They rank the rows of this page and compare with nothing else.",
    "One seed a row: what another seed would change is not in the intervals, which are over captions alone.",
)
HEAD = "| | steps | Fréchet distance | CLIP score | coverage |\n|---|---|---|---|---|\n"
WHAT_TRAINED = """All rows start as the teacher and see the same samples in the same order. The hinge is that of the
    last iterations logged, summed over the heads: two for each head that tells nothing apart."""
WHAT_SHOWN = """The first captions of the shuffled held-out set, every contender from the same noise. Nothing was picked
    by hand."""


def write_page(
    folder: Path,
    options: argparse.Namespace,
    block: Block,
    rows: Sequence[Trained],
    left_out: Mapping[str, str],
    evaluation: Evaluation,
    took_s: float,
) -> Path:
    """Write `index.html`, `report.json` and `README.md` into `folder`; returns the first."""
    targets = claims(block, evaluation)
    count, changes = len(evaluation.protocol.prompts), [*block.set, *options.set]
    missing = "".join(f" '{name}' is not here: {why}." for name, why in left_out.items())
    about = About(
        title=block.title,
        lead=f"After {block.paper}. {' '.join(target.note for target in targets)}{missing}",
        sets={
            "prompts": f"{count:,} captions of held-out icons, one each",
            "reference": "the real pictures of those captions",
            "network": evaluation.network,
            "changes to every row": ", ".join(changes) or "none",
            "took": f"{took_s / 60:.1f} minutes in all, less what an earlier run had done; training "
            f"{sum(one.seconds for one in rows) / 60:.1f}",
        },
        command=command(options),
        seed=options.seed,
        machine=machine_in_words(),
        versions=versions(),
        caveats=CAVEATS,
    )
    shown = sheets.side_by_side(evaluation, "compare", "The same prompt, the same seed", " ".join(WHAT_SHOWN.split()))
    report = Report(about, evaluation, targets, {"compare": shown}, [trained_table(rows)])
    page = write_report(report, folder)
    (folder / "README.md").write_text(markdown(about, targets, evaluation.results), encoding="utf-8")
    return page


def claims(block: Block, evaluation: Evaluation) -> list[Target]:
    """How the block's claim stands against each row that it should beat, where both were measured."""
    one_step = {result.group: result for result in reversed(evaluation.results)}  # the first of each group
    if block.claim not in one_step:
        return []
    return [claim(one_step[block.claim], one_step[name]) for name in block.beats if name in one_step]


def claim(mine: Result, other: Result) -> Target:
    """Whether `mine` has the lower Fréchet distance; the note says so, and whether the interval leaves it open."""
    ratio = frechet_ratio(mine, other)
    low, high = ratio.low or 0.0, ratio.high or 0.0
    said = "is better than" if high < 1 else "is worse than" if low > 1 else "cannot be told from"
    distances = [result.frechet_distance.value if result.frechet_distance else float("nan") for result in (mine, other)]
    note = (
        f"'{mine.group}' {said} '{other.group}' by Fréchet distance ({distances[0]:.2f} against "
        f"{distances[1]:.2f}, 95 % interval of the ratio {low:.2f} to {high:.2f}); "
        f"CLIP score {mine.clip_score.value:.2f} against {other.clip_score.value:.2f}."
    )
    what = f"Fréchet distance of '{mine.group}' over that of '{other.group}'"
    return Target(what, f"{ratio.value:.2f}x", "below 1x", ratio.value < 1, note)


def trained_table(rows: Sequence[Trained]) -> Tried:
    """What each row was, what it cost, and how its game stood at the end."""
    heads = ("row", "changes", "iterations x batch", "minutes", "hinge at the end", "the paper, at its scale")
    table = []
    for one in rows:
        loop, of = one.recipe.loop, 2 * sum(key.startswith("real_logits/") for key in one.last)
        hinge = f"{one.last['hinge']:.2f} of {of}" if of else "no heads"
        changes = ", ".join(one.row.set) or "none"
        cost = (f"{loop.iterations} x {loop.batch_size}", f"{one.seconds / 60:.1f}")
        table.append((one.row.name, f"{one.recipe.method}: {changes}", *cost, hinge, one.row.paper))
    return Tried("What was trained", " ".join(WHAT_TRAINED.split()), heads, tuple(table))


def markdown(about: About, targets: Sequence[Target], results: Sequence[Result]) -> str:
    """The figures for who reads the repository and not the page."""
    lines = []
    for one in results:
        distance = f"{one.frechet_distance.value:.2f}" if one.frechet_distance else "-"
        scores = f"{one.clip_score.value:.2f} | {100 * (one.coverage or 0):.0f} %"
        lines.append(f"| {one.group} | {one.num_inference_steps} | {distance} | {scores} |\n")
    said = "".join(f"- {target.note}\n" for target in targets)
    facts = "".join(f"- {name}: {text}\n" for name, text in about.sets.items())
    caveats = "".join(f"- {text}\n" for text in about.caveats)
    return (
        f"# {about.title}\n\n`index.html` beside this has the pictures, intervals, and what each row was; "
        f"`report.json` the numbers.\n\n{HEAD}{''.join(lines)}\n{said}\n## How\n\n{facts}\n    {about.command}\n\n"
        f"## What these figures do not say\n\n{caveats}"
    )


def command(options: argparse.Namespace) -> str:
    """The line that makes the page again, folders by their names alone: a page tells no one's directory tree."""
    words = ["python", "-m", "recipes.ablations.run", f"recipes/ablations/{options.block.name}"]
    for name in ("data", "network", "teacher", "autoencoder", "shards", "minutes", "set", "captions", "seed"):
        value = getattr(options, name)
        if not value:
            continue
        values = value if isinstance(value, list) else [value]
        texts = [
            one.name if isinstance(one, Path) else f"{one:g}" if isinstance(one, float) else str(one) for one in values
        ]
        if name == "set":
            words += [word for text in texts for word in ("--set", text)]
        else:
            words += [f"--{name}", *texts]
    return shlex.join(words)
