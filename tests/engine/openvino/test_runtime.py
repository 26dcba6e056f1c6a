import subprocess
import sys

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
