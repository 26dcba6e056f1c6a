"""What training resumes from: one dataclass, and the folder of safetensors that holds it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onestill.errors import CheckpointError, RecipeError

STATE_FILE = "state.json"


@dataclass
class TrainState:
    """Everything that changes while training. The loop has no other memory.

    Attributes:
        networks: the trained networks by role ("student", "discriminator", ...).
        optimizers: their optimizers, under the same or other names.
        ema: for each averaged role, the float32 running mean of its weights, by parameter name.
        generator: the one source of training noise, on the CPU.
        iteration: optimisation steps done. nimg: images seen. bad_steps: steps skipped for a NaN, in all.
        data: where the batches stand, as their `state()` says it.
    """

    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: dict[str, dict[str, Tensor]]
    generator: torch.Generator
    iteration: int = 0
    nimg: int = 0
    bad_steps: int = 0
    data: dict[str, Any] = field(default_factory=dict)

    def update_ema(self, decay: float) -> None:
        """Move each running mean towards the present weights; the warm-up keeps the first steps from weighing on it."""
        decay = min(decay, (1 + self.iteration) / (10 + self.iteration))
        for role, mean in self.ema.items():
            current = dict(self.networks[role].state_dict())
            floats = [name for name in mean if mean[name].is_floating_point()]
            torch._foreach_lerp_([mean[n] for n in floats], [current[n].float() for n in floats], 1 - decay)
            for name in mean.keys() - set(floats):
                mean[name].copy_(current[name])

    def averaged(self, role: str) -> dict[str, Tensor]:
        """The state dict to evaluate and ship: the running mean where there is one, else the weights."""
        return self.ema.get(role) or self.networks[role].state_dict()


def start_ema(network: nn.Module) -> dict[str, Tensor]:
    """A running mean that starts at the network's weights, float32."""
    return {
        name: (value.detach().float() if value.is_floating_point() else value.detach()).clone()
        for name, value in network.state_dict().items()
    }


def save_checkpoint(state: TrainState, folder: Path, fingerprint: str) -> None:
    """Write `folder` whole or not at all: everything goes to a temporary neighbour that is renamed at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for role, network in state.networks.items():
            save_file(_plain(network.state_dict()), partial / f"{role}.safetensors")
        for role, mean in state.ema.items():
            save_file(_plain(mean), partial / f"{role}.ema.safetensors")
        optimizers = {}
        for name, optimizer in state.optimizers.items():
            tensors, optimizers[name] = _split(optimizer.state_dict())
            save_file(tensors, partial / f"{name}.optimizer.safetensors")
        save_file({"generator": state.generator.get_state()}, partial / "random.safetensors")
        numbers = {"iteration": state.iteration, "nimg": state.nimg, "bad_steps": state.bad_steps, "data": state.data}
        text = json.dumps({**numbers, "optimizers": optimizers, "recipe": fingerprint}, indent=1)
        (partial / STATE_FILE).write_text(text, encoding="utf-8")
        drop_checkpoint(folder)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load_checkpoint(state: TrainState, folder: Path, fingerprint: str) -> None:
    """Fill `state` from `folder`, in place.

    Raises:
        CheckpointError: a file is missing or damaged.
        RecipeError: the checkpoint was made by a recipe that differs in more than its length.
    """
    try:
        saved = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if saved["recipe"] != fingerprint:
            changed = _changed(json.loads(saved["recipe"]), json.loads(fingerprint))
            raise RecipeError(
                f"the checkpoint {folder} comes from another recipe ({', '.join(changed)} differ): "
                "train into another 'out' folder, or put the recipe back."
            )
        for role, network in state.networks.items():
            network.load_state_dict(load_file(folder / f"{role}.safetensors"))
        for role, mean in state.ema.items():
            for name, value in load_file(folder / f"{role}.ema.safetensors").items():
                mean[name].copy_(value)
        for name, optimizer in state.optimizers.items():
            tensors = load_file(folder / f"{name}.optimizer.safetensors")
            optimizer.load_state_dict(_join(tensors, saved["optimizers"][name]))
            _match_layout(optimizer)
        state.generator.set_state(load_file(folder / "random.safetensors")["generator"])
    except RecipeError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged ({error}): delete it and resume from the one before."
        ) from error
    state.iteration, state.nimg, state.bad_steps = saved["iteration"], saved["nimg"], saved["bad_steps"]
    state.data = saved["data"]


def drop_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, if it is there; killed halfway, it leaves nothing that looks like one."""
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        os.replace(folder, aside)
        shutil.rmtree(aside)


def sweep(folder: Path) -> None:
    """Delete what a killed run left half-written or half-deleted in its folder of checkpoints."""
    for leftover in folder.glob(".[0-9]*-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / STATE_FILE).is_file())


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory or are not contiguous; copies are neither.
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _split(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named `index.key`, and the JSON-able rest."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {"param_groups": optimizer["param_groups"], "state": {}}
    for index, slots in optimizer["state"].items():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous().clone()
            else:
                rest["state"].setdefault(str(index), {})[key] = value
    return tensors, rest


def _join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(slots) for index, slots in rest["state"].items()}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give each moment its parameter's strides: safetensors keeps none, and fused kernels pair elements by memory."""
    for parameter, slots in optimizer.state.items():
        for key, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _changed(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """The dotted names of the settings in which two resolved recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changed(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at
