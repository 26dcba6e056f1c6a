"""Typed recipes: a TOML file read into frozen dataclasses, every key and range checked before anything heavy starts.

A recipe names its method, and that method's `Options` dataclass says which keys its table may hold:

    name = "icons-teacher"
    method = "diffusion"
    out = "runs/teacher"

    [data]
    shards = ["data/icons128/latents"]

    [loop]
    iterations = 4000
    batch_size = 64

    [diffusion]
    lr = 5e-4
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from onestill.errors import RecipeError, near

METHODS = ("autoencoder", "contrastive", "diffusion", "add", "ladd", "lcm", "decoder")
COMPILED = ("diffusion", "add", "ladd", "lcm", "decoder")  # others are work enough for a GPU as they are

# What sheets show where the recipe names no prompts: common things, for a model of anything.
SHEET_PROMPTS = ["a red apple", "a cat", "a house by the sea", "a blue car"]

T = TypeVar("T")


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    was: str = "",
) -> Any:
    """A dataclass field with its allowed range (both ends included) or choices, checked when a recipe is read.

    Args:
        was: another key that it had in the table around its own; the error for that key names the new one.
    """
    limits = {"low": low, "high": high, "choices": tuple(choices), "was": was}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the samples come from; relative paths start at the working directory.

    `images = false` leaves the pictures undecoded, for methods that train on cached latents alone. `workers` processes
    decode, beside the thread that makes `prefetch` batches ahead of the training; at 0 that thread decodes.
    """

    shards: list[str] = option([])
    images: bool = option(True)
    seed: int = option(0, low=0)
    prefetch: int = option(4, low=0, high=64)
    workers: int = option(0, low=0, high=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How long, how often, how carefully. `iterations` are optimisation steps of `batch_size` images each.

    The batch is what all processes take together, in `accumulate` passes each. `parallel` is how several processes
    share the work: "ddp" each holds everything, "fsdp" what trains is split among them.
    """

    iterations: int = option(1000, low=1)
    batch_size: int = option(32, low=1, high=65536)
    seed: int = option(0, low=0)
    accumulate: int = option(1, low=1, high=4096)
    parallel: str = option("ddp", choices=("ddp", "fsdp"))
    device: str = option("cpu")
    precision: str = option("no", choices=("no", "bf16"))
    compile: bool = option(False)
    threads: int = option(0, low=0, high=1024)
    log_every: int = option(20, low=1)
    sheet_every: int = option(500, low=1)
    checkpoint_every: int = option(500, low=1)
    keep_checkpoints: int = option(2, low=1)
    ema_decay: float = option(0.999, low=0.0, high=0.999999)
    warmup: int = option(100, low=0)
    decay: str = option("constant", choices=("constant", "cosine"))
    grad_clip: float = option(1.0, low=1e-6)
    max_bad_steps: int = option(10, low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One stage of training, completely. `options` is the method's own `Options`."""

    name: str
    method: str
    out: str
    data: DataOptions
    loop: LoopOptions
    options: Any

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain JSON-able values: what is printed and kept in the run folder."""
        plain = dataclasses.asdict(self)
        plain[self.method] = plain.pop("options")
        return plain

    def fingerprint(self) -> str:
        """What a checkpoint must share with the recipe that resumes it, as JSON."""
        return json.dumps(binding(self.resolved()), sort_keys=True)

    def default_fingerprint(self) -> str:
        """The same with every setting at its default, for checkpoints that are older than a setting."""
        kind = type(self.options)
        return dataclasses.replace(self, data=DataOptions(), loop=LoopOptions(), options=kind()).fingerprint()


def binding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe's settings, those that a run keeps for life: all but length, place and bookkeeping."""
    free = {
        "loop": ("iterations", "device", "log_every", "sheet_every", "checkpoint_every", "keep_checkpoints", "threads",
                 "max_bad_steps", "compile", "parallel", "accumulate"),
        "data": ("prefetch", "workers"),
        settings.get("method"): ("sheet_prompts",),
    }  # fmt: skip
    return {
        key: {name: one for name, one in value.items() if name not in free.get(key, ())}
        if isinstance(value, Mapping)
        else value
        for key, value in settings.items()
        if key != "out"
    }


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read `path`, apply `--set` overrides such as `loop.iterations=10`, check everything.

    Raises:
        RecipeError: the file does not parse, a key is unknown (with the nearest known one), a value has the wrong
            type or is out of range.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"the recipe {path} cannot be read ({error.strerror}): give the path of a .toml file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}.") from error
    for text in overrides:
        _override(table, text)
    return parse_recipe(table)


def parse_recipe(table: Mapping[str, Any]) -> Recipe:
    """The same from an already parsed table."""
    method = table.get("method")
    if method not in METHODS:
        hint = near(str(method), METHODS)
        raise RecipeError(f"the recipe's method is {method!r}: choose one of {', '.join(METHODS)}.{hint}")
    known = ("name", "method", "out", "data", "loop", method)
    for key in table:
        if key not in known:
            raise RecipeError(
                f"the recipe has an unknown key '{key}': it may hold {', '.join(known)}.{near(key, known)}"
            )
    for key in ("name", "out"):
        if not isinstance(table.get(key), str) or not table[key]:
            raise RecipeError(f"the recipe needs a text '{key}', for example {key} = \"my-run\".")
    loop = fill(LoopOptions, table.get("loop", {}), "loop")
    if loop.compile and method not in COMPILED:
        raise RecipeError(f"loop.compile is for {', '.join(COMPILED)}, not for {method}: leave it out.")
    options = importlib.import_module(f"onestill.train.methods.{method}").Options
    return Recipe(
        name=table["name"],
        method=method,
        out=table["out"],
        data=fill(DataOptions, table.get("data", {}), "data"),
        loop=loop,
        options=fill(options, table.get(method, {}), method),
    )


def fill(kind: type[T], values: Any, where: str) -> T:
    """The dataclass `kind` from a table, each key and value checked; `where` names the table in errors."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"'{where}' must be a table: write [{where}] on a line of its own.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if (inner := _inner_key(kind, key, fields)) and not isinstance(value, Mapping):
            raise RecipeError(f"the key '{where}.{key}' belongs in a table: write '{where}.{inner}'.")
        if key not in fields:
            raise RecipeError(f"unknown key '{where}.{key}'.{near(key, fields)} It may be one of {', '.join(fields)}.")
    made = {key: _checked(f"{where}.{key}", value, hints[key], fields[key].metadata) for key, value in values.items()}
    return kind(**made)


def _inner_key(kind: Any, key: str, own: Collection[str]) -> str:
    """Where in a table of `kind` a key stands that is not, or no longer, one of its `own`: "table.key", or ""."""
    for table, hint in typing.get_type_hints(kind).items():
        for field in dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ():
            if field.metadata.get("was") == key or (field.name == key and key not in own):
                return f"{table}.{field.name}"
    return ""


def _checked(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """`value` as the type that `hint` asks for, inside its limits."""
    if dataclasses.is_dataclass(hint):
        return fill(typing.cast(type[Any], hint), value, name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        hint = next(a for a in arguments if a is not type(None))
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise RecipeError(f"{name} must be a list, not {value!r}.")
        items = [_checked(f"{name}[{i}]", item, arguments[0], limits) for i, item in enumerate(value)]
        return items if origin is list else tuple(items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"{name} must be {hint.__name__}, not {value!r}.")
    low, high, choices = limits.get("low"), limits.get("high"), limits.get("choices")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"from {low} to {high}"
        raise RecipeError(f"{name} must be {allowed}, not {value}.")
    if choices and value not in choices:
        raise RecipeError(f"{name} must be one of {', '.join(choices)}, not {value!r}.{near(str(value), choices)}")
    return value


def _override(table: dict[str, Any], text: str) -> None:
    """Apply `a.b=value` to a parsed table; the value is TOML, or plain text where it is not."""
    key, equals, raw = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set takes KEY=VALUE, for example loop.iterations=100, not {text!r}.")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    for part in parts[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {text}: '{part}' is not a table.")
        table = inner
    table[parts[-1]] = value
