"""The commands, and the one place that turns an error into a line and an exit status."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import typer.main
from typer.core import TyperCommand

import onestill
from onestill.cli.console import SIGNALLED, note, say_error, say_interrupted
from onestill.errors import OnestillError

T = TypeVar("T")
USAGE = 2  # the exit status of a mistake in the command itself

# Each is a module of `onestill.cli.commands`, with a function of its name or, for a group of commands, an `app`.
COMMANDS = "generate serve keys gallery verify train evaluate bench export models data doctor".split()
BY_ENVIRONMENT = ("generate", "serve")


def make_app(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command line with these commands; each costs the time of its import and of reading its options."""
    app = typer.Typer(
        name="onestill", pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    for name in commands:
        module = importlib.import_module(f"onestill.cli.commands.{name}")
        if hasattr(module, "app"):
            for each in module.app.registered_commands:
                each.callback = from_home(each.callback)
            app.add_typer(module.app, name=name)
        else:
            app.command(name, cls=_WithEnvironment)(from_home(getattr(module, name)))
    app.callback(invoke_without_command=True)(root)
    return app


class _WithEnvironment(TyperCommand):
    """A command whose every option can also be given by an environment variable, such as ONESTILL_SERVE_PORT."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        for option in self.params if name in BY_ENVIRONMENT else ():
            if option.param_type_name == "option":
                longest = max(option.opts, key=len).removeprefix("--")
                own = f"ONESTILL_{name}_{longest}".upper().replace("-", "_")
                option.envvar = [str(option.envvar), own] if option.envvar else own


def from_home(command: Callable[..., T]) -> Callable[..., T]:
    """The command with `~` at the start of its paths as the user's home, which shells leave alone in `--out=~/x`."""
    if hasattr(command, "expands_home"):  # the commands of a group outlive an app
        return command

    @functools.wraps(command)
    def run(**values: Any) -> T:
        paths = {name: Path(os.path.expanduser(value)) for name, value in values.items() if isinstance(value, Path)}
        return command(**values | paths)

    run.expands_home = True  # type: ignore[attr-defined]
    return run


def print_version(asked: bool) -> None:
    """Print the version and stop, when asked to."""
    if asked:
        print(f"onestill {onestill.__version__}")
        raise typer.Exit


def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Pictures from prompts in one diffusion step: draw, serve, train, measure."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def say_warning(message: Warning | str, category: type[Warning], filename: str, *rest: object) -> None:
    """Print a warning of ours as one line; those of libraries are for their authors."""
    del rest
    if issubclass(category, RuntimeWarning) and "onestill" in filename:
        note(str(message))


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; see `onestill.cli.main`."""
    with warnings.catch_warnings():
        warnings.showwarning = say_warning  # type: ignore[assignment]
        return _run(arguments)


def _run(arguments: list[str] | None) -> int:
    first = (sys.argv[1:] if arguments is None else arguments)[:1]
    command = typer.main.get_command(make_app([name for name in COMMANDS if name in first] or COMMANDS))
    try:
        # The context says whether the command has the process for itself: a program may call `onestill.cli.main` too.
        status = command.main(arguments, prog_name="onestill", standalone_mode=False, obj=arguments is None)
    except OnestillError as error:
        say_error(str(error))
        return error.exit_status
    except typer.Abort:
        return say_interrupted()
    except OSError as error:
        if error.errno is None:  # not from the operating system: a fault of ours, which deserves its traceback
            raise
        where = f" '{error.filename}'" if error.filename is not None else ""
        say_error(f"The system refused{where}: {error.strerror}.")
        return USAGE
    except Exception as error:
        # Typer has moved its usage errors between modules; every version of them can format itself.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        message = str(format_message())
        stop = "" if message.endswith((".", "?", "!")) else "."
        say_error(f"{message}{stop} See '{command_path(error)} --help'.")
        return USAGE
    if isinstance(status, int) and status > SIGNALLED:
        return say_interrupted(status)
    return status if isinstance(status, int) else 0


def command_path(error: Exception) -> str:
    """The command that a usage error was made in, as typed: `onestill generate`."""
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "onestill"
