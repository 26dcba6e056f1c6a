"""How a server's process shares two cores between drawing and answering, so that neither waits long for the other."""

from __future__ import annotations

import gc
import os
import sys
import threading

__all__ = ["settle", "step_back"]

BEHIND = 5  # of niceness: the event loop, which needs little, has it when it wakes, not a slice of 3 ms later
SWITCH_S = 0.001  # after that a thread is asked for the interpreter; Python's own 5 ms are five live answers


def step_back() -> None:
    """Let the calling thread, and those it will start, compute after the others of this process. On Linux only."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, min(19, nice + BEHIND))


def settle() -> None:
    """When all is loaded: hand the interpreter over sooner, and have the collector leave alone what stays anyway."""
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
