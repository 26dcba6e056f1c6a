"""The processes that read ahead: deaf to what is sent to the group, and gone when who asks them is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from onestill.data.ahead import Ahead

SCRIPT = """
import sys, time
from tests.data.test_ahead import who
from onestill.data.ahead import Ahead
if __name__ == "__main__":
    ahead = Ahead(who, 1)
    print(*next(ahead([1, 2])), flush=True)
    time.sleep(1000)
"""


def who(numbers: Sequence[int]) -> tuple[int, int]:
    """The process that does the work, and its group."""
    return os.getpid(), os.getpgid(0)


def test_a_signal_to_the_group_leaves_them_at_work() -> None:
    ahead = Ahead(who, 1)
    try:
        ((process, group),) = ahead([1])
        assert group != os.getpgid(0)
        os.kill(process, signal.SIGINT)
        assert list(ahead([1])) == [(process, group)]
    finally:
        ahead.close()


def test_they_end_when_who_asks_is_killed() -> None:
    paths = os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True) as asks:
        assert asks.stdout is not None
        worker = int(asks.stdout.readline().split()[0])
        asks.kill()
    deadline = time.monotonic() + 120
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return bool(listed.stdout.strip()) and not listed.stdout.startswith("Z")
