"""What training resumes from: one dataclass, and the folder of safetensors that holds it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onestill.errors import CheckpointError, OutputError, RecipeError, first_line
from onestill.train.noise import Draw, Part, restore
from onestill.train.recipe import binding
from onestill.train.runtime.parallel import gathered, is_main, like, local, wait, whole

STATE_FILE = "state.json"


@dataclass
class TrainState:
    """Everything that changes while training. The loop has no other memory.

    Attributes:
        networks: the trained networks by role ("student", "discriminator", ...).
        optimizers: their optimizers, under the same or other names.
        ema: for each averaged role, the float32 running mean of its weights, by parameter name.
        generator: the one source of training noise, on the device where that is a GPU, else on the CPU. host: what
            Python's own choices come from, on the CPU; the same generator where that is there. part: which rows of a
            batch this process computes; `draw` gives the noise of those.
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
    part: Part = field(default_factory=Part)
    host: torch.Generator | None = None
    _pairs: dict[str, tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]] = field(default_factory=dict, repr=False)

    @property
    def draw(self) -> Draw:
        """Noise for the samples of this pass, from `generator`."""
        return Draw(self.generator, self.part, self.host)

    @property
    def random(self) -> dict[str, torch.Generator]:
        """The generators by the names that a checkpoint gives them."""
        both = {"generator": self.generator, "host": self.host or self.generator}
        return both if both["host"] is not self.generator else {"generator": self.generator}

    def age(self, role: str) -> int:
        """Iterations since the player of that role began, for what warms up: an optimizer's `begins` may be late."""
        return max(0, self.iteration - getattr(self.optimizers.get(role), "begins", 0))

    def update_ema(self, most: float) -> None:
        """Move each running mean towards the present weights; the warm-up keeps the first steps from weighing on it."""
        for role, mean in self.ema.items():
            decay = min(most, (1 + self.age(role)) / (10 + self.age(role)))
            if role not in self._pairs or self._pairs[role][0] is not mean:
                current = trained(self.networks[role])  # a pass through all modules, once: these share their memory
                pairs = [(local(value), local(current[name])) for name, value in mean.items()]
                self._pairs[role] = mean, pairs
            floats = [pair for pair in self._pairs[role][1] if pair[0].is_floating_point()]
            torch._foreach_lerp_([mine for mine, _ in floats], [its.float() for _, its in floats], 1 - decay)
            for mine, its in self._pairs[role][1]:
                if not mine.is_floating_point():
                    mine.copy_(its)

    def averaged(self, role: str) -> dict[str, Tensor]:
        """The weights to evaluate and ship: the running mean where there is one. Frozen ones are not among them."""
        return self.ema.get(role) or trained(self.networks[role])

    def shipped(self, role: str) -> dict[str, Tensor]:
        """`averaged`, on the CPU and whole in every process: all of them must ask."""
        return {name: whole(value).cpu() for name, value in self.averaged(role).items()}

    @contextmanager
    def using_average(self, role: str) -> Iterator[nn.Module]:
        """The network with its averaged weights, in evaluation mode; its own are back afterwards."""
        network = self.networks[role]
        own = {name: value.detach().clone() for name, value in trained(network).items()}
        was_training = network.training
        _put(network, self.averaged(role))
        network.eval()
        try:
            yield network
        finally:
            _put(network, own)
            network.train(was_training)


def trained(network: nn.Module) -> dict[str, Tensor]:
    """What of a network's state dict training changes: everything but frozen parameters, such as a LoRA's base."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in network.state_dict().items() if name not in frozen}


@torch.no_grad()
def _put(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, value in trained(network).items():
        value.copy_(weights[name])


def start_ema(network: nn.Module) -> dict[str, Tensor]:
    """A running mean that starts at the network's weights, float32."""
    return {
        name: (value.detach().float() if value.is_floating_point() else value.detach()).clone()
        for name, value in trained(network).items()
    }


def save_checkpoint(state: TrainState, folder: Path, fingerprint: str) -> None:
    """Write `folder` whole or not at all: everything goes to a temporary neighbour that is renamed at the end.

    Every process calls it, as sharded tensors are put together first; the main one writes. So a checkpoint does not
    know how many processes made it.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    files: dict[str, dict[str, Tensor]] = {}
    optimizers = {}
    for role, network in state.networks.items():
        files[role] = _plain(trained(network))
    for role, mean in state.ema.items():
        files[f"{role}.ema"] = _plain(mean)
    for name, optimizer in state.optimizers.items():
        files[f"{name}.optimizer"], optimizers[name] = _split(optimizer.state_dict())
    files["random"] = {name: generator.get_state() for name, generator in state.random.items()}
    # Each process stands at its own places in one order of the data; the furthest is where any number of them go on.
    data = max(gathered(state.data), key=lambda at: list(at.values()))
    if is_main():
        try:
            _write(state, folder, fingerprint, files, optimizers, data)
        except OSError as error:
            whole = checkpoints(folder.parent)
            before = f"{whole[-1].name} before it is whole" if whole else "there is none before it"
            raise OutputError(
                f"the checkpoint {folder} cannot be written ({error.strerror or error}) and {before}: make room, then "
                "--resume."
            ) from error
    wait()


def _write(
    state: TrainState,
    folder: Path,
    fingerprint: str,
    files: Mapping[str, dict[str, Tensor]],
    optimizers: Mapping[str, Any],
    data: Mapping[str, Any],
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, tensors in files.items():
            save_file(tensors, partial / f"{name}.safetensors")
        numbers = {"iteration": state.iteration, "nimg": state.nimg, "bad_steps": state.bad_steps, "data": dict(data)}
        text = json.dumps({**numbers, "optimizers": optimizers, "recipe": fingerprint}, indent=1)
        (partial / STATE_FILE).write_text(text, encoding="utf-8")
        drop_checkpoint(folder)
        os.replace(partial, folder)
    except SafetensorError as error:  # which hides what the system said
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(str(error)) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load_checkpoint(state: TrainState, folder: Path, fingerprint: str, defaults: str = "{}") -> None:
    """Fill `state` from `folder`, in place; tensors are split as `state`'s are.

    Args:
        defaults: the recipe with every setting at its default, as `fingerprint` is written: what a checkpoint says of
            settings that are younger than it.

    Raises:
        CheckpointError: a file is missing or damaged.
        RecipeError: the checkpoint was made by a recipe that differs in more than its length.
    """
    try:
        saved = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        settings = _filled(binding(json.loads(saved["recipe"])), json.loads(defaults))
        changed = list(_changed(settings, json.loads(fingerprint)))
        if changed:
            raise RecipeError(
                f"the checkpoint {folder} comes from another recipe ({', '.join(changed)} differ): "
                "train into another 'out' folder, or put the recipe back."
            )
        for role, network in state.networks.items():
            _fill(trained(network), load_file(folder / f"{role}.safetensors"))
        for role, mean in state.ema.items():
            _fill(mean, load_file(folder / f"{role}.ema.safetensors"))
        for name, optimizer in state.optimizers.items():
            tensors = load_file(folder / f"{name}.optimizer.safetensors")
            optimizer.load_state_dict(_join(tensors, saved["optimizers"][name]))
            _match_layout(optimizer)
        saved_random = load_file(folder / "random.safetensors")
        for name, generator in state.random.items():  # what was trained on a CPU had one generator for both
            restore(generator, saved_random.get(name, saved_random["generator"]))
        state.iteration, state.nimg, state.bad_steps = saved["iteration"], saved["nimg"], saved["bad_steps"]
        state.data = saved["data"]
    except RecipeError:
        raise
    except Exception as error:  # of a damaged state that is still JSON, anything
        raise CheckpointError(
            f"the checkpoint {folder} is damaged ({first_line(error)}): delete it and resume from the one before."
        ) from error


def drop_checkpoint(folder: Path) -> None:
    """Delete a checkpoint or an export, if it is there; killed halfway, it leaves nothing that looks like one."""
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


@torch.no_grad()
def _fill(into: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy every saved tensor into its namesake."""
    if into.keys() != saved.keys():
        raise ValueError(f"its weights are others, such as {next(iter(into.keys() ^ saved.keys()))}")
    for name, value in saved.items():
        if value.shape != into[name].shape:
            raise ValueError(f"{name} has another shape")
        into[name].copy_(like(value, into[name]))


def _filled(saved: Any, defaults: Any) -> Any:
    """Settings with what they lack taken from the defaults."""
    if not isinstance(saved, dict) or not isinstance(defaults, dict):
        return saved
    return defaults | {key: _filled(value, defaults.get(key)) for key, value in saved.items()}


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _copy(value) for name, value in tensors.items()}


def _copy(value: Tensor) -> Tensor:
    """A whole copy on the CPU, in the main process alone: the others help to put it together and keep nothing."""
    # safetensors refuses tensors that share memory or are not contiguous; copies are neither.
    put_together = whole(value.detach())
    return put_together.cpu().contiguous().clone() if is_main() else put_together.new_empty(0)


def _split(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named `index.key`, and the JSON-able rest."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {"param_groups": optimizer["param_groups"], "state": {}}
    for index, slots in optimizer["state"].items():
        for key, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = _copy(value)
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
    """Give each moment its parameter's strides: safetensors keeps none, and fused kernels pair elements by memory.

    And its parameter's share, where parameters are sharded.
    """
    for parameter, slots in optimizer.state.items():
        for key, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                with torch.no_grad():
                    slots[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(like(value, parameter))


def _changed(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """The dotted names of the settings in which two resolved recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changed(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at
