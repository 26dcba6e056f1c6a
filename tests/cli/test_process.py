"""The command as a shell starts it: what only a process of its own can show."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

COMMAND = [sys.executable, "-m", "onestill"]
MOST_SECONDS = 300


def test_json_alone_is_on_standard_output(tiny_folder: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "generate", "a star", "--seed", "1", "--json", "--model", str(tiny_folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["images"][0]["path"] == "a-star-1.png"
    assert done.stderr == ""


def test_a_mistake_is_one_line_and_two(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "generate", ""], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_prompt_of_broken_bytes_is_one_line_and_two(tiny_folder: Path, tmp_path: Path) -> None:
    command = [*map(os.fsencode, COMMAND), b"generate", b"\xff star", b"--model", os.fsencode(tiny_folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def read_until(terminal: int, wanted: str, deadline: float) -> str:
    """What a program wrote to its terminal, up to and with `wanted`."""
    text = ""
    while wanted not in text and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # Linux's word for the end of a terminal that nobody holds any more
                break
    return text


def test_ctrl_c_is_one_line_and_130_and_leaves_whole_pictures(tiny_folder: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "generate", "a star", "--num", "1000", "--model", str(tiny_folder), "--out", "many"]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are deaf to Ctrl-C
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, preexec_fn=listen) as process:
        os.close(theirs)
        try:
            deadline = time.monotonic() + MOST_SECONDS
            shown = read_until(ours, "drawing", deadline)  # the bar, which is there as standard error is a terminal
            while not list(tmp_path.glob("many/*.png")) and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(MOST_SECONDS) == 130
            shown += read_until(ours, "interrupted", deadline)
        finally:
            process.kill()
            os.close(ours)
    assert "interrupted" in shown
    assert "Traceback" not in shown
    files = sorted((tmp_path / "many").iterdir())
    assert 0 < len(files) < 1000
    for file in files:
        assert file.suffix == ".png"
        with Image.open(file) as picture:
            picture.load()


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-", "2>&-"])
@pytest.mark.parametrize("arguments", ["models", "generate star --seed 1 --out star.png --model {model}"])
def test_closed_streams_are_nobodys_trouble(tiny_folder: Path, tmp_path: Path, arguments: str, closed: str) -> None:
    line = f"{shlex.join(COMMAND)} {arguments.format(model=shlex.quote(str(tiny_folder)))} {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if arguments.startswith("generate"):
        with Image.open(tmp_path / "star.png") as picture:  # in which nothing was printed
            picture.load()


@pytest.mark.parametrize("out", ["| exec true", "> /dev/full"])
def test_output_that_nobody_takes_is_one_line_at_most(tiny_folder: Path, tmp_path: Path, out: str) -> None:
    if "full" in out and not Path("/dev/full").exists():
        pytest.skip("this system has no full device")
    line = (
        f"{{ {shlex.join(COMMAND)} generate star --out s.png --model {shlex.quote(str(tiny_folder))}; echo $? >&2; }}"
    )
    done = subprocess.run(["sh", "-c", f"{line} {out}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()
    assert said.pop() != "0" or "full" not in out
    assert len(said) == ("full" in out)
    assert all(text.startswith("error: ") and "No space left" in text for text in said)
