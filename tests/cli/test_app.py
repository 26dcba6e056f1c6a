from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer.main

import onestill
from onestill.cli import app, main
from onestill.errors import RecipeError

Refused = Callable[..., str]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"onestill {onestill.__version__}\n"


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    for command in ("generate", "train", "models", "doctor"):
        assert command in said


def test_a_mistyped_command_or_option_is_one_line_that_helps(refused: Refused) -> None:
    assert "Did you mean 'generate'? See 'onestill --help'." in refused("generat")
    assert "--steps" in refused("generate", "--stepz", "1", "apple")
    assert "See 'onestill generate --help'." in refused("generate")
    assert "--steps" in refused("generate", "--steps", "many", "apple")
    assert "--num" in refused("generate", "--num", "0", "apple")


def test_an_interrupt_is_one_line_and_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onestill.checkpoint.resolve", interrupted)
    assert main(["models", "icons"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_system_s_refusals_are_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a.png")

    monkeypatch.setattr("onestill.checkpoint.resolve", full)
    assert refused("models", "icons") == "error: The system refused 'a.png': No space left on device.\n"


def test_errors_of_several_lines_are_told_in_one(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str) -> None:
        raise RecipeError("first\n  second")

    monkeypatch.setattr("onestill.checkpoint.resolve", wrong)
    assert refused("models", "icons") == "error: first second\n"


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("onestill.checkpoint.resolve", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        app.run(["models", "icons"])


def test_a_command_imports_none_of_the_others() -> None:
    code = "import sys; from onestill.cli import main; main(['verify', '--help']); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name for name in said.split() if name.startswith("onestill.cli.")}
    assert "onestill.cli.commands.verify" in loaded
    assert not loaded & {f"onestill.cli.{name}" for name in app.COMMANDS if name != "verify"}


def test_every_option_of_a_server_is_a_variable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = typer.main.get_command(app.make_app())
    given = {
        "ONESTILL_SERVE_PORT": "8123",
        "ONESTILL_SERVE_ALLOW_HOST": "a.example b.example",
        "ONESTILL_SERVE_GALLERY": "1",
        "ONESTILL_SERVE_BLOCKED_WORDS": "words.txt",
        "ONESTILL_SERVE_LOG_FORMAT": "json",
        "ONESTILL_SERVE_TRIAL_LIMIT": "",
        "ONESTILL_GENERATE_MODEL": "other",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    def parsed(name: str, arguments: list[str]) -> dict[str, Any]:
        with group.commands[name].make_context(name, arguments) as context:
            return dict(context.params)

    found = parsed("serve", ["--host", "::1"])
    assert (found["port"], found["allow_host"], found["gallery"]) == (8123, ["a.example", "b.example"], True)
    assert (str(found["blocked_words"]), found["log_format"], found["trial_limit"]) == ("words.txt", "json", None)
    assert parsed("serve", ["--port", "1"])["port"] == 1
    assert parsed("generate", ["apple"])["model"] == "other"
    monkeypatch.setenv("ONESTILL_DATABASE", "one")
    assert parsed("serve", [])["database"] == "one"
    for name in ("serve", "generate"):
        for option in group.commands[name].params:
            if option.param_type_name == "option":
                own = f"ONESTILL_{name}_{option.opts[0][2:]}".upper().replace("-", "_")
                assert own in ([option.envvar] if isinstance(option.envvar, str) else option.envvar)


def test_help_names_the_variables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert "ONESTILL_SERVE_METRICS_PORT" in said
    assert "ONESTILL_DATABASE, ONESTILL_SERVE_DATABASE" in said


def test_a_wrong_variable_is_named(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONESTILL_SERVE_PORT", "many")
    assert "ONESTILL_SERVE_PORT" in refused("serve")
