"""Settings of a server's process, so that drawing and answering share few cores without waiting long for each other."""

from __future__ import annotations

import gc
import os
import sys
import threading

__all__ = ["lower_priority", "tune_interpreter"]

# Added to a thread's niceness. The event loop needs little time; so it gets a core at once when it wakes, and does not
# wait for the end of a time slice of 3 ms.
NICENESS = 5
SWITCH_S = (
    0.001  # a thread gives the interpreter up after that; Python's default of 5 ms delays a live answer five times
)


def lower_priority() -> None:
    """Lower the priority of the calling thread, and of those that it will start. Does nothing where it is not Linux."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    nice = os.getpriority(os.PRIO_PROCESS, thread)
    os.setpriority(os.PRIO_PROCESS, thread, min(19, nice + NICENESS))


def tune_interpreter() -> None:
    """Shorten the interval in which threads switch, and exempt all that is loaded by now from garbage collection."""
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
