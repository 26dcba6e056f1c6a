"""A small process that starts the server's anew when that dies, on the same listening socket.

It is a fork made before anything heavy is imported, so it costs some milliseconds and little memory. It hands signals
on, ends as the server ends, and takes the server along when it is killed. Linux only; elsewhere the server is alone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import NoReturn

__all__ = ["Supervised", "supervise"]

LOG = logging.getLogger("onestill.serve")
PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # before a start that follows so many that did not last
LASTING_S = 60.0  # a server that ran for so long was started well
MOST_STARTS = 5  # in a row that never served, after which its last exit status is passed on
SILENT_S = 60.0  # a server whose event loop says nothing for so long is killed
END_S = 9.5  # after SIGTERM or SIGINT
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Supervised:
    """A server's tie to its supervisor.

    Args:
        line: to the supervisor; None where there is none.
        bound: the listening socket of the server that was there before, None at the first start.
    """

    def __init__(self, line: socket.socket | None = None, bound: socket.socket | None = None) -> None:
        self._line = line
        self.bound = bound

    def keep(self, bound: socket.socket) -> None:
        """Have a listening socket kept open over restarts, so that clients wait and are not refused."""
        if self._line is not None and self.bound is None:
            socket.send_fds(self._line, [b"b"], [bound.fileno()])

    def beat(self) -> None:
        """Say that the event loop runs; the first time says that the server serves."""
        if self._line is not None:
            with suppress(OSError):
                self._line.send(b".", socket.MSG_DONTWAIT)


def supervise() -> Supervised:
    """Fork. Returns in the server's process, at every start of it; the supervisor ends inside."""
    if sys.platform != "linux":
        return Supervised()
    heard = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        heard.add(signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    supervisor = _Supervisor(heard)
    while True:
        line = supervisor.start()
        if line is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return Supervised(line, supervisor.bound)
        supervisor.watch()


class _Supervisor:
    """The state of the supervisor's own process; `heard` are the signals that it waits for."""

    def __init__(self, heard: set[signal.Signals]) -> None:
        self.bound: socket.socket | None = None
        self._heard = heard
        self._served = False  # once at least
        self._short = self._unserved = 0  # starts in a row that did not last, and that never served
        self._asked_at: float | None = None  # when it was asked to end

    def start(self) -> socket.socket | None:
        """Fork a server; returns its line to the supervisor there, and None here."""
        sys.stdout.flush()
        sys.stderr.flush()
        ours, theirs = socket.socketpair()
        own = os.getpid()
        self._began = time.monotonic()
        self._child = os.fork()
        if self._child == 0:
            ours.close()
            _die_with(own)
            return theirs
        theirs.close()
        ours.setblocking(False)
        self._line = ours
        return None

    def watch(self) -> None:
        """Wait until the server ends; returns where it is to be started again, else this process ends too."""
        beaten = looked = time.monotonic()
        serves = False
        while True:
            self._hear(1.0)
            now = time.monotonic()
            ended, status = os.waitpid(self._child, os.WNOHANG)
            if self._beats():
                beaten, serves = now, True
            elif now - looked > SILENT_S / 4 + 1:  # this process was stopped meanwhile, and the server too
                beaten = now
            looked = now
            if ended:
                break
            if serves and self._asked_at is None and now - beaten > SILENT_S:
                LOG.critical("The server's event loop has not run for %g s; it is killed.", SILENT_S)
                os.kill(self._child, signal.SIGKILL)
            elif self._asked_at is not None and now - self._asked_at > END_S:
                os.kill(self._child, signal.SIGKILL)
        self._line.close()
        self._after(os.waitstatus_to_exitcode(status), serves)

    def _after(self, status: int, served: bool) -> None:
        self._served |= served
        self._unserved = 0 if served else self._unserved + 1
        self._short = 0 if time.monotonic() - self._began > LASTING_S else self._short + 1
        # What fails before it ever served, such as a wrong option, fails again; a database may come back.
        if self._is_asked() or status == 0 or not self._served or self._unserved >= MOST_STARTS:
            _end_as(status)
        said = f"by signal {-status}" if status < 0 else f"with status {status}"
        LOG.critical("The server ended %s; it is started again.", said)
        until = time.monotonic() + PAUSES_S[min(self._short, len(PAUSES_S)) - 1] if self._short else 0.0
        while not self._is_asked() and time.monotonic() < until:
            self._hear(until - time.monotonic())
        if self._is_asked():
            _end_as(0)

    def _is_asked(self) -> bool:
        return self._asked_at is not None

    def _hear(self, wait_s: float) -> None:
        """Wait for a signal, and hand it on."""
        found = signal.sigtimedwait(self._heard, max(0.0, wait_s))
        if found is None or found.si_signo == signal.SIGCHLD:
            return
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            if self.bound is not None:
                self.bound.close()  # so that new clients are refused as soon as the server closes its own
        if found.si_code <= 0:  # from a process; what comes from the terminal, the server got too
            with suppress(ProcessLookupError):
                os.kill(self._child, found.si_signo)

    def _beats(self) -> bool:
        """Read what the server said; returns whether it serves."""
        serves = False
        with suppress(BlockingIOError, ConnectionError):
            while True:
                said, fds, _, _ = socket.recv_fds(self._line, 4096, 1)
                for fd in fds:
                    self.bound = socket.socket(fileno=fd)
                if not said:
                    break
                serves |= b"." in said
        return serves


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _end_as(status: int) -> NoReturn:
    """End this process as the server ended."""
    if status < 0 and -status in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        os.kill(os.getpid(), -status)
    os._exit(status if status >= 0 else 128 - status)
