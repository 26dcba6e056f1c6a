"""`onestill generate`: pictures from prompts."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onestill.cli.console import note, note_device, once, print_json, progress
from onestill.cli.options import (
    AdditionOptions,
    CompileOptions,
    Json,
    Model,
    RuntimeOptions,
    Size,
    parse_size,
    with_groups,
)
from onestill.cli.output import Target
from onestill.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from onestill.pipeline import Pipeline

MOST_PICTURES = 1000  # of one prompt
QUICK_START_STEPS = 50  # in all; up to there a quick start saves more than it costs
PICTURES_PER_CALL = 8  # of the pipeline: so few that the bar moves and Ctrl-C loses little
DEFAULT_STRENGTH = 0.5
TIMES = ("encode_ms", "denoise_ms", "decode_ms", "total_ms")


@with_groups
def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="What to draw, in quotation marks. Each prompt is drawn.")
    ],
    *,
    model: Model = "icons",
    runtime: RuntimeOptions,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Number of sampling steps, 1 to 50. (default: the model's)")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", metavar="N", help="Picture i has seed SEED + i. (default: random)")
    ] = None,
    num: Annotated[
        int, typer.Option(metavar="N", min=1, max=MOST_PICTURES, help="Number of pictures for each prompt.")
    ] = 1,
    size: Size = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="How closely to follow the prompt; 1 turns guidance off. (default: the model's)"
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What guidance steers away from. (default: nothing)")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar="NAME", help="How to step from noise to a picture. (default: the model's)")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture to start from. (default: noise)")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            "--mask",
            metavar="FILE",
            help="With --image: draw only where this picture is transparent, or white. (default: everywhere)",
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(metavar="X", help="With --image: 0 keeps it, 1 ignores it. (default: 0.5)")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE|DIR",
            help="A .png, .jpg or .webp file, or a folder. (default: a file named by prompt and seed)",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that exist. (default: choose a free name)")
    ] = False,
    additions: AdditionOptions,
    compiling: CompileOptions,
    as_json: Json = False,
) -> None:
    """Draw pictures from prompts.

    Prints the path of each picture. A default name never replaces a file: it takes the next free number.
    """
    for option, value in (("--strength", strength), ("--mask", mask)):
        if value is not None and image is None:
            raise ImageError(f"{option} needs a picture to start from; add --image FILE.")
    height, width = parse_size(size)
    added = additions.arguments()
    wanted = [prompt for prompt in prompts for _ in range(num)]
    target = Target(out, len(wanted), force)
    settings: dict[str, Any] = {
        "image": read_image(image) if image is not None else None,
        "mask": read_image(mask) if mask is not None else None,
        "strength": DEFAULT_STRENGTH if strength is None else strength,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "sampler": sampler,
    }
    first_seed = secrets.randbelow(2**31) if seed is None else seed

    started = time.perf_counter()
    from onestill.pipeline import load
    from onestill.pipeline.checks import checked_prompts, checked_seed

    checked_prompts(prompts)
    checked_seed(first_seed, len(wanted))

    pipe = load(
        model,
        **vars(runtime),
        **added,
        quick_start=len(wanted) * (steps or 1) <= QUICK_START_STEPS,
        options=compiling.torch_options(),
    )
    load_ms = (time.perf_counter() - started) * 1000
    # The first pause comes when all arguments have been checked, so that a mistake prints one line and no note.
    settings["pause"] = once(lambda: note_device(runtime.device, pipe.info.engine, pipe.info.device))
    images, timings, notes = draw(pipe, wanted, first_seed, settings, target)
    for text in notes:
        note(text)
    if not as_json:
        print(*(drawn["path"] for drawn in images), sep="\n")
        return
    print_json(
        {
            "images": images,
            "timings": {"load_ms": round(load_ms, 1)} | timings,
            "model": pipe.info.name,
            "engine": pipe.info.engine,
            "device": pipe.info.device,
            "dtype": pipe.info.dtype,
            "num_inference_steps": pipe.info.num_inference_steps if steps is None else steps,
            "notes": notes,
        }
    )


def draw(
    pipe: Pipeline, prompts: list[str], first_seed: int, settings: dict[str, Any], target: Target
) -> tuple[list[dict[str, str | int]], dict[str, float], list[str]]:
    """Draw one picture per entry of `prompts`, picture i with seed `first_seed + i`, and save each as it is done.

    Returns:
        What was saved, in order; the milliseconds spent in each part, summed; and what is worth knowing, each once.
    """
    images: list[dict[str, str | int]] = []
    timings = dict.fromkeys(TIMES, 0.0)
    notes: dict[str, None] = {}
    with progress("drawing", len(prompts)) as advance:
        for start in range(0, len(prompts), PICTURES_PER_CALL):
            output = pipe(prompts[start : start + PICTURES_PER_CALL], seed=first_seed + start, **settings)
            for i, (prompt, seed, picture) in enumerate(zip(output.prompts, output.seeds, output.images, strict=True)):
                path = target.path(prompt, seed)
                output.save(i, path, force=target.force)
                width, height = picture.size
                images.append({"path": str(path), "prompt": prompt, "seed": seed, "width": width, "height": height})
            for name in TIMES:
                timings[name] += getattr(output.timings, name)
            notes.update(dict.fromkeys(output.notes))
            advance(len(output.images))
    return images, {name: round(value, 1) for name, value in timings.items()}, list(notes)


def read_image(path: Path) -> Image:
    """The picture in the file `path`, as `onestill.pipeline.picture.read_picture` gives it."""
    from onestill.pipeline.picture import read_picture

    try:
        return read_picture(path)
    except FileNotFoundError as error:
        raise ImageError(f"There is no picture '{path}'; check the path.") from error
    except (OSError, ImageError) as error:
        raise ImageError(f"'{path}' cannot be read as a picture ({error}); give a PNG, JPEG or WebP file.") from error
