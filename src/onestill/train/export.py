"""What leaves a distillation: the averaged student as a diffusers folder or a LoRA file, each with its model card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig

from onestill import __version__
from onestill.networks.denoiser import copy_with_weights, unet_folder
from onestill.networks.libraries import quiet_libraries
from onestill.train.runtime.parallel import is_main
from onestill.train.state import TrainState

# Every layer with a weight matrix, as LCM-LoRA has it: attention, feed-forward, convolutions, timestep projections.
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
SCHEDULERS = {"euler_ancestral": "EulerAncestralDiscreteScheduler", "consistency": "LCMScheduler"}
CARD = """---
license: {licence}
library_name: diffusers
tags: [text-to-image, onestill, distillation, {method}]
---

# {name}

Made with onestill {version} by `{method}` from the teacher `{teacher}`: {nimg} images in {iteration} iterations,
{bad_steps} of them skipped. Draw in 1 to 4 steps, with {guidance}.

{use}

Data: {data}

The teacher's licence binds what is made from it: {licence}.

## Last numbers of the run

```json
{numbers}
```

## Recipe

```json
{recipe}
```
"""


def add_lora(unet: Any, rank: int) -> Any:
    """Freeze a UNet and give it an adapter that starts at no change; only the adapter's weights then train."""
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
    )
    return unet


def save_averaged(state: TrainState, role: str, folder: Path) -> None:
    """Write the averaged network of that role, a diffusers model, into `folder`; every process calls it."""
    averaged = copy_with_weights(state.networks[role], state.shipped(role), torch.device("cpu"))
    if is_main():
        averaged.save_pretrained(folder)


def export_student(distiller: Any, state: TrainState, folder: Path) -> None:
    """Write the averaged student of a `Distiller` into `folder`.

    A full student goes to `folder/unet`; where the teacher is a whole model, its other parts are copied beside it and
    `folder` is a model that diffusers opens. A LoRA goes to `folder/pytorch_lora_weights.safetensors`.
    """
    weights = state.shipped("student")
    if not is_main():
        return
    options = distiller.options
    model = unet_folder(options.teacher).parent
    index = model / "model_index.json"
    folder.mkdir(parents=True, exist_ok=True)
    if options.lora_rank:
        layers = {name.replace(".default.", "."): value.contiguous() for name, value in weights.items()}
        with quiet_libraries():
            # Named here and not at the top: importing pipelines costs seconds, and transformers speaks of torchvision.
            diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    else:
        student = copy_with_weights(distiller.student, weights, torch.device("cpu"))
        student.register_to_config(sample_size=distiller.side)
        student.save_pretrained(folder / "unet")
        if index.is_file():
            _copy_parts(model, folder)
            _write_scheduler(distiller, folder)
    if options.lora_rank or index.is_file():
        (folder / "README.md").write_text(_card(distiller, state, folder), encoding="utf-8")


def _copy_parts(model: Path, folder: Path) -> None:
    """Everything of a model but its UNet, its scheduler and its card."""
    for part in sorted(model.iterdir()):
        if part.is_dir() and part.name not in ("unet", "scheduler", "openvino") and not part.name.startswith("."):
            shutil.copytree(part, folder / part.name, dirs_exist_ok=True)
    shutil.copyfile(model / "model_index.json", folder / "model_index.json")


def _write_scheduler(distiller: Any, folder: Path) -> None:
    """The student's own sampler, trailing, so that one step starts at pure noise; named in the model's index too."""
    kind = SCHEDULERS[distiller.sampler]
    config = {**distiller.student_denoiser.schedule.to_config(), "steps_offset": 1, **distiller.sampler_config}
    with quiet_libraries():
        getattr(diffusers, kind).from_config(config).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", kind]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _card(distiller: Any, state: TrainState, folder: Path) -> str:
    """The README of an export: where it comes from, under which licence, with which settings and numbers."""
    options, out = distiller.options, folder.parent
    recipe = out / "recipe.json"
    made: dict[str, Any] = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    metrics = out / "metrics.jsonl"
    last = metrics.read_text(encoding="utf-8").splitlines()[-1:] if metrics.is_file() else []
    if options.lora_rank:
        settings = {"timestep_spacing": '"trailing"', **distiller.sampler_config}
        use = "Load it onto the teacher with `pipeline.load_lora_weights(folder)`; set the scheduler to "
        use += f"{SCHEDULERS[distiller.sampler]}, `{', '.join(f'{name}={value}' for name, value in settings.items())}`."
    else:
        use = "Open it with `diffusers.DiffusionPipeline.from_pretrained(folder)`."
    return CARD.format(
        licence=options.licence or _licence(unet_folder(options.teacher).parent),
        method=made.get("method", "onestill"),
        name=made.get("name", "student"),
        version=__version__,
        teacher=options.teacher,
        nimg=state.nimg,
        iteration=state.iteration,
        guidance=distiller.guidance_note,
        bad_steps=state.bad_steps,
        use=use,
        data=options.data_note or ", ".join(made.get("data", {}).get("shards", [])) or "not stated",
        numbers=json.dumps(json.loads(last[0]), indent=1) if last else "{}",
        recipe=json.dumps(made, indent=1),
    )


def _licence(model: Path) -> str:
    """What the teacher's own card says, "unknown" if it has none."""
    card = model / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    return found.group(1) if found else "unknown"
