"""Run the commands of a page as a newcomer would: its fenced blocks, in order, in a fresh clone of this repository.

    python docs/follow.py docs/distil-your-own.md

A block without a language runs as it stands. A block with a language, or one that is indented by four spaces, does not
run. One shell runs all blocks and stops at the first failure. The time of each block is reported. The clone contains
what is committed and nothing else.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
DONE = "onestill-follow:"
DEVELOPERS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # variables that a newcomer has not set


def blocks(page: str) -> list[tuple[str, str]]:
    """The commands of a Markdown page, in order: (the heading above, a fenced block without a language)."""
    found = []
    for match in FENCE.finditer(page):
        headings = HEADING.findall(FENCE.sub("", page[: match.start()]))  # comments in blocks are no headings
        if not match.group(1):
            found.append((headings[-1] if headings else "", match.group(2)))
    return found


def script(commands: Sequence[tuple[str, str]]) -> str:
    """One shell script of all blocks. After each block it prints a line with the number of the block."""
    parts = ["set -euo pipefail\n"]
    parts += [f"{block}echo {shlex.quote(f'{DONE}{number}')}\n" for number, (_, block) in enumerate(commands)]
    return "".join(parts)


def follow(commands: Sequence[tuple[str, str]], folder: Path) -> tuple[list[float], int]:
    """Run the blocks in `folder`. Returns the seconds of each block that ended, and the shell's exit status."""
    file = folder / ".follow.sh"
    file.write_text(script(commands), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name not in DEVELOPERS}
    began, seconds = time.monotonic(), list[float]()
    with subprocess.Popen(["bash", file.name], cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        for line in shell.stdout:
            before, done, _ = line.partition(DONE)  # the last line of a command may lack its newline
            print(before, end="", flush=True)
            if done:
                seconds.append(time.monotonic() - began - sum(seconds))
                print(f"== {commands[len(seconds) - 1][0]}: {seconds[-1]:.0f} s", file=sys.stderr, flush=True)
    return seconds, shell.returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the page that is named. The exit status is the shell's, or 1 if the page took too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--minutes", type=float, default=0, help="fail if it takes longer (0: no limit)")
    parser.add_argument("--keep", type=Path, help="a new folder for the clone (a temporary one by default)")
    options = parser.parse_args(arguments)
    commands = blocks(options.page.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        seconds, status = follow(commands, folder)
    for (heading, _), took in zip(commands, seconds, strict=False):
        print(f"{took:7.0f} s  {heading}")
    minutes = sum(seconds) / 60
    print(f"{len(seconds)} of {len(commands)} blocks in {minutes:.1f} minutes")
    return status or int(bool(options.minutes) and minutes > options.minutes)


if __name__ == "__main__":
    raise SystemExit(main())
