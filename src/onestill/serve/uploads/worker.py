"""The process that decodes uploads, one after the other: `python -m onestill.serve.uploads.worker`.

It imports Pillow and NumPy and no more, has the lowest claim on the processor, and no file it decodes can make it take
more memory or processor time than `ask` allows: the system ends it, or the server does. `decoder` starts it.
"""

from __future__ import annotations

import io
import math
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
from PIL.Image import Image

from onestill.pipeline.masks import MaskSizeError, fitted_mask
from onestill.pipeline.picture import fitted
from onestill.serve.uploads.checks import CostlyImageError, check_cost

__all__ = ["ANSWER", "ASK", "DONE", "INVALID", "OTHER_SIZE", "READY", "TOO_COSTLY", "TOO_LARGE", "decoded"]

FORMATS = ("PNG", "JPEG", "WEBP")
# Bytes of the file and of the image whose mask it is, or 0, pixels that each may have, height and width to fit it to;
# then the file and that image.
ASK = struct.Struct(">IIIII")
ANSWER = struct.Struct(">Bf")  # what became of it, and the processor time that it took, in seconds
READY, DONE, INVALID, TOO_LARGE, TOO_COSTLY, OTHER_SIZE = b"RDIPCS"  # in an answer; pixels, uint8, follow DONE
NICENESS = 15
CPU_S = 6  # processor time of one file; the largest ordinary ones take one second
SPARE = 64 * 2**20  # bytes of memory for a decoder beside the pixels
EACH_PX = 32  # bytes of memory for a pixel: eight copies of four bytes


def decoded(
    data: bytes, height: int, width: int, most_px: int, masked: bytes = b""
) -> tuple[int, NDArray[np.uint8] | None]:
    """An upload as uint8 [height, width, 3], or as a mask [height, width], and DONE, or None and why there is none.

    The cost and the size are read from a file before any pixel is decoded.

    Args:
        data: the file.
        height, width: pixels of the result.
        most_px: pixels that the file may have.
        masked: the file of the image whose mask it is; none where it is no mask.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that `_opened` checks
            with _opened(data, most_px) as picture:
                if not masked:
                    return DONE, fitted(picture, height, width)
                with _opened(masked, most_px) as image:
                    return DONE, fitted_mask(picture, image, height, width)
    except PIL.Image.DecompressionBombError:
        return TOO_LARGE, None
    except MaskSizeError:
        return OTHER_SIZE, None
    except (CostlyImageError, MemoryError):
        return TOO_COSTLY, None
    except Exception:  # a damaged file may raise anything that Pillow's decoders do
        return INVALID, None


def _opened(data: bytes, most_px: int) -> Image:
    check_cost(data)
    picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    if math.prod(picture.size) > most_px or max(picture.size) > 64 * min(picture.size):
        raise PIL.Image.DecompressionBombError
    return picture


def main() -> None:
    """Answer what comes on the standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, and that ends this process
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _answer(sink, READY)
    while len(head := source.read(ASK.size)) == ASK.size:
        size, masked_size, most_px, height, width = ASK.unpack(head)
        _limit(size + masked_size + SPARE + EACH_PX * most_px * (2 if masked_size else 1))
        data, masked = source.read(size), source.read(masked_size)
        before = time.process_time()
        outcome, pixels = decoded(data, height, width, most_px, masked)
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
