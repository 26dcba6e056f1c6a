"""The server as a process: kill -9 and SIGTERM under load. The long form is `benchmarks/serve/crash.py`."""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from benchmarks.serve.crash import rounds
from benchmarks.serve.server import running
from onestill.engine.device import choose


def faults(said: str) -> list[str]:
    """What a server said beyond the note on what it warms up."""
    return [line for line in said.splitlines() if not line.startswith("note: warming up: ")]


@pytest.mark.slow
def test_kill_loses_and_doubles_nothing_and_sigterm_ends_well(tiny_folder: Path, tmp_path: Path) -> None:
    options = ["--model", str(tiny_folder), "--threads", "1"]
    report = rounds(f"sqlite:///{tmp_path / 'serve.db'}", 2, 1.5, options, typists=3, clients=3)
    assert report["ok"], report
    assert not report["keys_lost"]
    assert report["pictures_arrived"] > 0
    end = report["sigterm"]
    assert (end["status"], faults(end["errors"])) == (0, [])
    assert end["seconds"] < 10
    assert set(end["api_statuses"]) <= {"200", "503", "lost"}


def test_sigterm_closes_the_sockets_and_answers_what_runs(tiny_folder: Path) -> None:
    with running(["--model", str(tiny_folder), "--threads", "1"]) as process:
        answers: list[object] = []
        thread = threading.Thread(target=lambda: answers.append(process.draw(n=8, num_inference_steps=20)))
        with connect(process.socket_url, compression=None, proxy=None) as live:
            assert json.loads(live.recv(timeout=60))["type"] == "ready"
            thread.start()
            time.sleep(0.3)
            status, seconds = process.stop(signal.SIGTERM)
            with pytest.raises(ConnectionClosed) as closed:
                live.recv(timeout=20)
        thread.join(60)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012  # service restart: the page connects again
        assert len(answers) == 1
        assert (status, faults(process.errors())) == (0, [])
        assert seconds < 10


def test_a_thousand_idle_connections_keep_nobody_out(tiny_folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with running(["--model", str(tiny_folder), "--threads", "1"]) as process, contextlib.ExitStack() as open_ones:
            for _ in range(1000):
                open_ones.enter_context(socket.create_connection((process.host, process.port), timeout=20))
            assert process.draw(seed=1)["data"]
            assert process.stop(signal.SIGTERM)[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("engine", "notes"), [("auto", 0), ("torch", 1)])
def test_the_first_line_says_where_it_draws(tiny_folder: Path, engine: str, notes: int) -> None:
    device = choose() if engine == "torch" else "cpu"
    with running(["--model", str(tiny_folder), "--engine", engine]) as server:
        assert server.line == f"onestill draws at {server.url}/ on {device} (Ctrl-C ends it)\n"
        assert server.errors().count(f"note: torch computes on {'the CPU' if device == 'cpu' else device}") == notes
        assert server.stop()[0] == 0


def test_a_process_with_a_port_for_metrics_and_a_log_of_json(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--model", str(tiny_folder), "--threads", "1", "--metrics-port", str(port)]
    with running([*options, "--log-format", "json", "--log-level", "info", "--root-path", "/draw"]) as process:

        def ask(at: int, path: str, host: str = "localhost") -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", at, timeout=60)
            connection.request("GET", path, headers={"host": host, "x-request-id": "it"})
            answer = connection.getresponse()
            found = answer.status, answer.read().decode()
            connection.close()
            return found

        status, text = ask(port, "/metrics", "monitored.example")
        assert (status, "onestill_ready 1" in text) == (200, True)
        assert [ask(port, path)[0] for path in ("/healthz", "/readyz", "/", "/v1/models")] == [200, 200, 404, 404]
        assert [ask(process.port, path)[0] for path in ("/metrics", "/healthz", "/draw/", "/draw/v1/models")] == [
            404,
            200,
            200,
            200,
        ]
        assert "/metrics" not in json.loads(ask(process.port, "/openapi.json")[1])["paths"]
        status, seconds = process.stop(signal.SIGTERM)
        assert (status, seconds < 10) == (0, True)
        lines = [json.loads(line) for line in faults(process.errors())]
    routes = [line["route"] for line in lines if "route" in line]
    assert routes == ["other", "/healthz", "/", "/v1/models", "other"]
    assert {line.get("request_id") for line in lines if "route" in line} == {"it"}
