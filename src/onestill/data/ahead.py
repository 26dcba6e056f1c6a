"""Work done ahead by processes of their own, its results taken in order.

One Python thread decodes about two thousand cached samples a second, pictures far fewer, and a GPU may want more.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, Generic, TypeVar

from onestill.errors import DataError

AT_ONCE = 32  # numbers a process is given at a time: handing over costs by the message
PIECES = 4  # of work that wait for each process, so that none stands still while the results are taken
R = TypeVar("R")


class Ahead(Generic[R]):
    """Calls `do` on runs of numbers in `workers` processes, each of which has a copy of it. Close it when done.

    Args:
        do: what can be pickled, and its results too.
        workers: how many processes; they start when the first run is asked for.
    """

    def __init__(self, do: Callable[[Sequence[int]], R], workers: int) -> None:
        self._workers = workers
        # Not forked: the process that asks may hold threads and a GPU.
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (do,))

    def __call__(self, numbers: Sequence[int]) -> Iterator[R]:
        """The results for `numbers`, AT_ONCE of them in each, in order.

        Raises:
            DataError: a process was killed.
        """
        runs = (numbers[i : i + AT_ONCE] for i in range(0, len(numbers), AT_ONCE))
        waiting = deque[Future[Any]](self._pool.submit(_do, run) for run in islice(runs, self._workers * PIECES))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(self._pool.submit(_do, run) for run in islice(runs, 1))
                yield result
        except BrokenProcessPool as error:
            raise DataError(
                "a process that read the data was killed, perhaps for memory: lower data.workers and resume."
            ) from error
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=True, cancel_futures=True)


_doing: Callable[[Sequence[int]], Any]


def _begin(do: Callable[[Sequence[int]], Any]) -> None:
    global _doing
    # What is sent to the process group is for the process that asks, which may still want samples to save and then
    # ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _doing = do


def _end_with_parent() -> None:
    """End when the process that asks is killed, as nobody else would end this one."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(numbers: Sequence[int]) -> Any:
    return _doing(numbers)
