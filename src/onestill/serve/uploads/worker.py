"""The process that decodes uploads, one after the other: `python -m onestill.serve.uploads.worker`.

It imports Pillow and NumPy and no more, has the lowest claim on the processor, and no file it decodes can make it take
more memory or processor time than `ask` allows: the system ends it, or the server does. `decoder` starts it.
"""

from __future__ import annotations

import io
import os
import signal
import struct
import sys
import time
import warnings
from typing import BinaryIO

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from onestill.pipeline.picture import fitted
from onestill.serve.uploads.checks import CostlyImageError, check_cost

__all__ = ["ANSWER", "ASK", "DONE", "INVALID", "READY", "TOO_COSTLY", "TOO_LARGE", "decoded"]

FORMATS = ("PNG", "JPEG", "WEBP")
ASK = struct.Struct(">IIII")  # bytes of the file, pixels that it may have, height and width to fit it to; then the file
ANSWER = struct.Struct(">Bf")  # what became of it, and the processor time that it took, in seconds
READY, DONE, INVALID, TOO_LARGE, TOO_COSTLY = b"RDIPC"  # in an answer; pixels, uint8 RGB, follow DONE
NICENESS = 15
CPU_S = 6  # processor time of one file; the largest ordinary ones take one second
SPARE = 64 * 2**20  # bytes of memory for a decoder beside the pixels
EACH_PX = 32  # bytes of memory for a pixel: eight copies of four bytes


def decoded(data: bytes, height: int, width: int, most_px: int) -> tuple[int, NDArray[np.uint8] | None]:
    """An upload as uint8 [height, width, 3], and what became of it: DONE, or why there is none.

    The cost and the size are read from the file before any pixel is decoded.
    """
    try:
        check_cost(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that the next lines check
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                own_width, own_height = picture.size
                if own_width * own_height > most_px or max(picture.size) > 64 * min(picture.size):
                    return TOO_LARGE, None
                return DONE, fitted(picture, height, width)
    except PIL.Image.DecompressionBombError:
        return TOO_LARGE, None
    except (CostlyImageError, MemoryError):
        return TOO_COSTLY, None
    except Exception:  # a damaged file may raise anything that Pillow's decoders do
        return INVALID, None


def main() -> None:
    """Answer what comes on the standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, and that ends this process
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _answer(sink, READY)
    while len(head := source.read(ASK.size)) == ASK.size:
        size, most_px, height, width = ASK.unpack(head)
        _limit(size + SPARE + EACH_PX * most_px)
        data = source.read(size)
        before = time.process_time()
        outcome, pixels = decoded(data, height, width, most_px)
        _answer(sink, outcome, pixels, time.process_time() - before)


def _answer(sink: BinaryIO, outcome: int, pixels: NDArray[np.uint8] | None = None, took_s: float = 0.0) -> None:
    sink.write(ANSWER.pack(outcome, took_s))
    if pixels is not None:
        sink.write(pixels.tobytes())
    sink.flush()


def _limit(memory: int) -> None:
    """Let the system end this process, or refuse it memory, where the next file takes more. Linux and macOS alone."""
    if sys.platform == "win32":
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + CPU_S)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, 0)  # it writes no file
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, mapped + memory)


def _lower(what: int, wanted: int) -> None:
    import resource

    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    main()
