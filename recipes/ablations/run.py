r"""The paper's Table 1 at the icons' scale: each row of a block is trained, drawn with and measured alike.

    python -m recipes.ablations.run recipes/ablations/losses.toml --data data/icons128 \
        --network runs/icons-cpu/evaluator/export --set loop.iterations=1000 --out runs/ablations

A block names a base recipe and rows of `--set` changes to it. What is done is passed over: run again after an
interruption and it goes on. The result is OUT/BLOCK/results.json and results.md. Rows share seeds, data and captions.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onestill
from onestill.cli import main as onestill_main
from onestill.errors import RecipeError
from onestill.evaluate import Protocol, Result, evaluate, load_network
from onestill.train.recipe import read_recipe
from recipes.icons import ship
from recipes.icons.evaluate import Pool, contender

HEAD = "| row | steps | FID | CLIP score | density | coverage | paper, at its scale |\n|---|---|---|---|---|---|---|\n"


def read_block(path: Path) -> dict[str, Any]:
    """A block's table, its rows' changes checked against their recipes."""
    block = tomllib.loads(path.read_text(encoding="utf-8"))
    for row in block["row"]:
        read_recipe(Path(row.get("base", block["base"])), row["set"])
    return block


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def trained(block: dict[str, Any], row: dict[str, Any], folder: Path, options: argparse.Namespace) -> Path:
    """The row's model in diffusers' format, trained and shipped unless it is there."""
    base, out = Path(row.get("base", block["base"])), folder / slug(row["name"])
    model = out / "model"
    if (model / "onestill.json").is_file():
        return model
    sets = [*row["set"], *options.set, f"out={json.dumps(str(out / 'run'))}"]
    recipe = read_recipe(base, sets)
    arguments = [part for change in sets for part in ("--set", change)]
    if onestill_main(["train", str(base), "--resume", *arguments]):
        raise RecipeError(f"the row '{row['name']}' did not train: see above.")
    parts = ["--unet", str(out / "run/export/unet"), "--autoencoder", recipe.options.autoencoder]
    place = ["--text-encoder", recipe.options.text_encoder, "--out", str(model), "--name", slug(row["name"])]
    ship.main([*parts, *place, "--force"])
    return model


def measured(models: list[tuple[dict[str, Any], Path]], folder: Path, options: argparse.Namespace) -> list[Result]:
    """Every row's figures on the same held-out captions and seeds."""
    pool = Pool(options.data, options.seed)
    samples = pool.take(options.captions)
    protocol = Protocol(
        prompts=tuple(sample.caption for sample in samples),
        seeds=tuple(range(options.seed, options.seed + len(samples))),
        num_worst=0,
        num_diversity_prompts=0,
        colour_test=None,
        batch_size=options.batch_size,
    )
    network = load_network(options.network, models[0][1])
    contenders = []
    for row, model in models:
        pipeline = onestill.load(model)
        sampler = row.get("sampler", pipeline.info.sampler)
        contenders += [contender(pipeline, row["name"], steps, 1.0, sampler) for steps in row.get("steps", [1])]
    return list(evaluate(contenders, protocol, pool.pictures(samples), [network], folder / "drawn").results)


def table(block: dict[str, Any], results: Sequence[Result], options: argparse.Namespace) -> str:
    """The results as Markdown."""
    paper = {row["name"]: row["paper"] for row in block["row"]}
    lines = [
        f"| {one.group} | {one.num_inference_steps} | {one.fid.value if one.fid else float('nan'):.2f} "
        f"| {one.clip_score.value:.2f} | {one.density or 0:.3f} | {one.coverage or 0:.3f} | {paper[one.group]} |\n"
        for one in results
    ]
    changes = ", ".join(options.set) or "none"
    return (
        f"# {block['title']}\n\nAfter the paper's {block['paper']}. {options.captions} held-out captions, one seed "
        f"each; FID and CLIP score by the evaluation network, which compare within this page only. Changes to every "
        f"row: {changes}.\n\n{HEAD}{''.join(lines)}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("block", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with val/, style/ and concept/ shards")
    parser.add_argument("--network", type=Path, required=True, help="the evaluation-only contrastive model")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--set", action="append", default=[], help="a change to every row's recipe")
    parser.add_argument("--captions", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    block = read_block(options.block)
    folder = options.out / options.block.stem
    models = [(row, trained(block, row, folder, options)) for row in block["row"]]
    results = measured(models, folder, options)
    facts = [
        {"row": one.group, "steps": one.num_inference_steps, "fid": one.fid.value if one.fid else None}
        | {"clip_score": one.clip_score.value, "density": one.density, "coverage": one.coverage}
        for one in results
    ]
    (folder / "results.json").write_text(json.dumps({"set": options.set, "rows": facts}, indent=1) + "\n")
    (folder / "results.md").write_text(table(block, results, options), encoding="utf-8")
    print(folder / "results.md")


if __name__ == "__main__":
    main()
