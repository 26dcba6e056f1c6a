from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable

import pytest

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
