import subprocess
import sys
from pathlib import Path

import pytest

LOOK = """
import sys
import onestill.engine.openvino.engine
print(*(name for name in sys.modules if "telemetry" in name or name.startswith("openvino.tools.ovc")))
import openvino
print(hasattr(openvino, "no_such_thing"))
from openvino import convert_model
from openvino.tools.ovc import convert_model as its_own
print(convert_model is its_own)
"""


def test_the_engine_does_not_load_what_reports_over_the_network_and_others_still_find_it() -> None:
    told = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["", "False", "True"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_engines_that_come_and_go_leave_the_stack_for_signals(tiny_folder: Path) -> None:
    """OpenVINO puts one under the thread; where it is freed, the next Ctrl-C kills the process without a word."""
    script = """
import gc, signal, sys
from onestill.pipeline import load
first = load(sys.argv[1])
second = load(sys.argv[1])
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("heard", flush=True))
signal.raise_signal(signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tiny_folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
