r"""The paper's Table 1 at the icons' scale: each row of a block is trained, drawn with and measured alike.

    python -m recipes.ablations.run recipes/ablations/cpu.toml --data data/icons128 \
        --network runs/icons-cpu/evaluator/export --minutes 14

Rows share teacher, seeds, data and captions. What is done is passed over and what was interrupted goes on: run the same
command again. Runs and models lie in OUT/BLOCK, the page in REPORT/BLOCK.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import onestill
from onestill.cli import main as onestill_main
from onestill.errors import RecipeError
from onestill.evaluate import (
    Contender,
    Evaluation,
    Protocol,
    evaluate,
    fingerprint,
    load_network,
    pipeline_contender,
)
from onestill.evaluate.samples import slug
from onestill.train.recipe import Recipe
from recipes.ablations.block import Block, Row, Trained, read_block, row_base, row_recipe
from recipes.ablations.page import write_page
from recipes.icons import ship
from recipes.icons.evaluate import SPLITS, Pool, Progress, show

TRAINING_SHARE = 0.8  # of the time given; the rest is for drawing and measuring
TEACHER_SAMPLER = "ddim"
SHOWN = 12  # captions on the page's sheet


class Budget:
    """Says whether another row has time to end; none is cut short.

    Args:
        minutes: for everything, drawing and measuring too; 0 is no limit.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + minutes * 60 * TRAINING_SHARE if minutes else float("inf")
        self.slowest_s = 0.0

    def fits(self) -> bool:
        return time.monotonic() + self.slowest_s <= self._end


def placed(method: str, options: argparse.Namespace) -> list[str]:
    """The command's folders as changes to a recipe of `method`."""
    given = {key: getattr(options, key) for key in ("teacher", "autoencoder", "text_encoder")}
    sets = [f"{method}.{key}={json.dumps(str(value))}" for key, value in given.items() if value is not None]
    return sets + ([f"data.shards={json.dumps([str(path) for path in options.shards])}"] if options.shards else [])


def train_row(block: Block, row: Row, folder: Path, options: argparse.Namespace) -> Trained:
    """Train and ship a row, unless that was done with these settings and this teacher.

    Raises:
        RecipeError: it did not train, or its folder holds something else.
    """
    out = folder / slug(row.name)
    method = row_recipe(options.block, block, row).method
    sets = [*block.set, *row.set, *options.set, *placed(method, options), f"out={json.dumps(str(out / 'run'))}"]
    base = row_base(options.block, block, row)
    recipe = row_recipe(options.block, block, row, sets)
    model, note = out / "model", out / "row.json"
    facts = {"recipe": recipe.resolved(), "teacher": fingerprint(Path(recipe.options.teacher))}
    found = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {**facts, "seconds": None}
    if found["teacher"] != facts["teacher"]:
        raise RecipeError(f"{out} was begun with another teacher: give another --out, or remove it.")
    if found["seconds"] is None or found["recipe"] != facts["recipe"]:
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({**facts, "seconds": None}), encoding="utf-8")
        began = time.monotonic()
        status = onestill_main(
            ["train", str(base), "--resume", *(part for change in sets for part in ("--set", change))]
        )
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise RecipeError(f"the row '{row.name}' did not train: see above.")
        ship_unet(out / "run/export/unet", recipe, model, slug(row.name))
        found = {**facts, "seconds": time.monotonic() - began}
        note.write_text(json.dumps(found), encoding="utf-8")
        print(f"{row.name}: {recipe.loop.iterations} iterations in {found['seconds']:.0f} s", flush=True)
    last = (out / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return Trained(row, recipe, model, found["seconds"], json.loads(last))


def ship_unet(unet: Path, recipe: Recipe, model: Path, name: str) -> None:
    """Make a UNet a model that every engine draws with."""
    parts = ["--unet", str(unet), "--autoencoder", recipe.options.autoencoder]
    place = ["--text-encoder", recipe.options.text_encoder, "--out", str(model), "--name", name, "--force"]
    ship.main([*parts, *place])


def teacher_contenders(block: Block, recipe: Recipe, folder: Path) -> list[Contender]:
    """The teacher of all rows in each of the block's numbers of steps."""
    if not block.teacher_steps:
        return []
    model = folder / f"teacher-{fingerprint(Path(recipe.options.teacher))}"
    if not (model / "onestill.json").is_file():
        ship_unet(Path(recipe.options.teacher), recipe, model, "teacher")
    pipeline, guidance = onestill.load(model), block.teacher_guidance
    return [pipeline_contender(pipeline, "teacher", steps, guidance, TEACHER_SAMPLER) for steps in block.teacher_steps]


def measured(block: Block, rows: Sequence[Trained], folder: Path, options: argparse.Namespace) -> Evaluation:
    """Every row on the same held-out captions and seeds."""
    pool = Pool(options.data, options.seed)
    samples = pool.take(options.captions or block.captions)
    protocol = Protocol(
        prompts=tuple(sample.caption for sample in samples),
        seeds=tuple(range(options.seed, options.seed + len(samples))),
        sheets={"compare": tuple(range(min(SHOWN, len(samples))))},
        num_worst=0,
        num_diversity_prompts=0,
        colour_test=None,
        batch_size=options.batch_size,
    )
    contenders = []
    for one in rows:
        pipeline = onestill.load(one.model)
        sampler = one.row.sampler or pipeline.info.sampler
        contenders += [pipeline_contender(pipeline, one.row.name, steps, 1.0, sampler) for steps in one.row.steps]
    contenders += teacher_contenders(block, rows[0].recipe, folder)
    network, progress = load_network(options.network, rows[0].model, name="evaluation"), Progress()
    return evaluate(contenders, protocol, pool.pictures(samples), [network], folder / "drawn", progress=progress)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("block", type=Path)
    held_out = ", ".join(f"{split}/" for split in SPLITS)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with the held-out shards {held_out}")
    parser.add_argument("--network", type=Path, required=True, help="the evaluation-only contrastive model")
    parser.add_argument("--teacher", type=Path, help="in place of the recipes' own")
    parser.add_argument("--autoencoder", type=Path, help="in place of the recipes' own")
    parser.add_argument("--text-encoder", help="in place of the recipes' own")
    parser.add_argument("--shards", type=Path, nargs="+", help="cached training shards, in place of the recipes' own")
    parser.add_argument("--minutes", type=float, default=0, help="begin no row that would end too late (0: no limit)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--report", type=Path, default=Path("recipes/ablations/report"))
    parser.add_argument("--set", action="append", default=[], help="a change to every row's recipe")
    parser.add_argument("--captions", type=int, default=0, help="held-out captions (0: as the block says)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Path:
    began, block, budget = time.monotonic(), read_block(options.block), Budget(options.minutes)
    folder = options.out / options.block.stem
    rows, left_out = list[Trained](), dict[str, str]()
    for row in block.row:
        if not budget.fits():
            left_out[row.name] = "no time was left for it"
            continue
        started = time.monotonic()
        try:
            rows.append(train_row(block, row, folder, options))
        except RecipeError as error:
            print(f"{row.name}: {error}", file=sys.stderr)
            left_out[row.name] = "it did not train"
        budget.slowest_s = max(budget.slowest_s, time.monotonic() - started)
    if not rows:
        raise RecipeError("no row was trained: see above.")
    evaluation = measured(block, rows, folder, options)
    took_s = time.monotonic() - began
    return write_page(options.report / options.block.stem, options, block, rows, left_out, evaluation, took_s)


def main(arguments: Sequence[str] | None = None) -> None:
    show(lambda: run(parse(arguments)))


if __name__ == "__main__":
    main()
