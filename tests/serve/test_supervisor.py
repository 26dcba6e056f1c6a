"""The process that starts the server's anew, over small programs that end in every way, and over a real server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serve.server import running
from onestill.serve.run import ENGINE_LOST

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="servers are supervised on Linux only")
WAIT = 30
PROGRAM = """
import os, signal, socket, sys, time
from onestill.serve import supervisor
supervisor.PAUSES_S = (0.0, 0.05)
supervisor.SILENT_S, supervisor.END_S = 1.0, 1.5
supervised = supervisor.supervise()
bound = supervised.bound or socket.create_server(("127.0.0.1", 0))
supervised.keep(bound)
print(os.getpid(), os.getppid(), bound.getsockname()[1], flush=True)
def serve():
    supervised.beat()
"""


@contextlib.contextmanager
def program(rest: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + rest], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> list[int]:
    """The next start: the server's id, its supervisor's, and the port."""
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waited for yet counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_a_server_that_never_served_is_not_started_again(status: int) -> None:
    with program(f"sys.exit({status})") as process:
        assert process.wait(WAIT) == status
        assert len(said(process)) == 3
        assert said(process) == []


def test_a_server_that_ends_well_is_not_started_again() -> None:
    with program("serve(); sys.exit(0)") as process:
        assert process.wait(WAIT) == 0


@pytest.mark.parametrize(
    ("end", "last"),
    [
        (f"os._exit({ENGINE_LOST})", ENGINE_LOST),
        ("os.kill(os.getpid(), 9)", 128 + 9),
        ("raise ValueError", 1),
        ("os.abort()", 128 + 6),
    ],
)
def test_a_server_that_dies_is_started_again_on_its_socket_until_it_serves_no_more(
    end: str, last: int, tmp_path: Path
) -> None:
    count = tmp_path / "count"
    rest = f"""
with open({str(count)!r}, "a") as file:
    file.write("x")
if os.path.getsize({str(count)!r}) < 4:
    serve()
{end}
"""
    with program(rest) as process:
        status = process.wait(WAIT)
        starts = [said(process) for _ in range(9)]
        assert process.stderr is not None
        text = process.stderr.read()
    assert [len(start) for start in starts] == [3] * 8 + [0]  # three that served, and five that did not
    assert len({port for _, _, port in starts[:8]}) == 1
    assert len({parent for _, parent, _ in starts[:8]}) == 1
    assert text.count("it is started again") == 7
    assert status == last


def test_clients_wait_while_the_server_is_started_again() -> None:
    rest = """
serve()
while True:
    client, _ = bound.accept()
    word = client.recv(10)
    if word == b"die":
        os._exit(1)
    client.sendall(word)
    client.close()
"""
    with program(rest) as process:
        first, _, port = said(process)
        time.sleep(0.2)  # the first beat is heard
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as client:
            client.sendall(b"die")
            while not is_gone(first):
                time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as client:
            client.sendall(b"hello")
            assert client.recv(10) == b"hello"


def test_a_server_whose_loop_says_nothing_is_killed() -> None:
    with program("serve(); time.sleep(1000)") as process:
        first = said(process)
        second = said(process)
        assert first[0] != second[0]
        assert is_gone(first[0])


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_server_and_the_status_comes_back(name: signal.Signals) -> None:
    handled = "signal.signal(%d, lambda *_: os._exit(7)); serve()\nwhile True: time.sleep(0.1); serve()"
    with program(handled % name) as process:
        said(process)
        time.sleep(0.3)
        process.send_signal(name)
        assert process.wait(WAIT) == 7
    default = "signal.signal(%d, signal.SIG_DFL); serve()\nwhile True: time.sleep(0.1); serve()"
    with program(default % name) as process:
        server = said(process)[0]
        time.sleep(0.3)
        process.send_signal(name)
        assert process.wait(WAIT) == -name
        assert is_gone(server)


def test_a_server_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(0.1); serve()"
    with program(rest) as process:
        said(process)
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 128 + signal.SIGKILL
        assert time.monotonic() - started < 15


def test_a_supervisor_that_is_killed_takes_its_server_along() -> None:
    with program("serve()\nwhile True: time.sleep(0.1); serve()") as process:
        server = said(process)[0]
        time.sleep(0.3)
        process.kill()
        process.wait(WAIT)
        for _ in range(500):
            if is_gone(server):
                break
            time.sleep(0.02)
        assert is_gone(server)


def test_sighup_that_nohup_ignores_ends_nobody() -> None:
    rest = "serve()\nwhile True: time.sleep(0.1); serve()"
    command = [sys.executable, "-c", PROGRAM + rest]
    process = subprocess.Popen(["nohup", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        said(process)
        time.sleep(0.3)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


HANGS = """
import os, sys, time
import onestill.pipeline as pipeline
from onestill.cli import main
call = pipeline.Pipeline.__call__
def hangs(self, prompt, **options):
    while "hang" in prompt[0] or os.path.exists(os.environ["HANG"]):
        time.sleep(0.05)
    return call(self, prompt, **options)
pipeline.Pipeline.__call__ = hangs
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_real_server_whose_engine_hangs_answers_and_is_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    process = subprocess.Popen(
        [sys.executable, script, "serve", "--port", "0", "--model", tiny_folder, "--threads", "1", "--timeout", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "HANG": str(tmp_path / "hang")},
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
        answers: list[tuple[int, float]] = []

        def draw(prompt: str) -> None:
            body = json.dumps({"prompt": prompt}).encode()
            url = f"http://127.0.0.1:{port}/v1/images/generations"
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            started = time.monotonic()
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    status = answer.status
            except urllib.error.HTTPError as error:
                status = error.code
            answers.append((status, time.monotonic() - started))

        threads = [threading.Thread(target=draw, args=(prompt,)) for prompt in ("hang", "a red apple")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [status for status, _ in answers] == [503, 503]
        assert max(seconds for _, seconds in answers) < 10
        deadline = time.monotonic() + 60
        while answers[-1][0] != 200 and time.monotonic() < deadline:
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                draw("a red apple")
        assert answers[-1][0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
        assert process.stderr is not None
        errors = process.stderr.read()
        assert f"ended with status {ENGINE_LOST}; it is started again" in errors
        assert "has not answered for 3 s" in errors
    finally:
        process.kill()
        process.communicate()


def test_without_restarts_the_server_is_alone(tiny_folder: Path) -> None:
    with running(["--model", str(tiny_folder), "--threads", "1", "--no-restart"]) as server:
        assert not Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
        assert server.draw(seed=1)["data"]
        assert server.stop()[0] == 0
