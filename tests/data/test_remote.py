from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from onestill.data.remote import expand, fetch, read_hashes
from onestill.errors import DataError

BODY = bytes(range(256)) * 40


class Server(BaseHTTPRequestHandler):
    """Serves BODY as /a.tar with ranges, /plain.tar without, /short.tar cut short; notes what it was asked."""

    asked: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        if self.path not in ("/a.tar", "/plain.tar", "/short.tar"):
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.path != "/plain.tar" else 0
        if start >= len(BODY):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        self.wfile.write(BODY[start:-100] if self.path == "/short.tar" else BODY[start:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_ranges_are_written_out() -> None:
    assert expand("s/x-{08..11}.tar") == ["s/x-08.tar", "s/x-09.tar", "s/x-10.tar", "s/x-11.tar"]
    assert expand("{0..1}/{0..1}.tar") == ["0/0.tar", "0/1.tar", "1/0.tar", "1/1.tar"]
    assert expand("x.tar") == ["x.tar"]
    with pytest.raises(DataError, match="falls"):
        expand("{3..1}")


def test_a_shard_is_copied_once(server: str, tmp_path: Path) -> None:
    path = fetch(f"{server}/a.tar", tmp_path / "new")
    assert path.read_bytes() == BODY
    assert fetch(f"{server}/a.tar", tmp_path / "new") == path
    assert Server.asked == [None]


def test_what_a_break_left_is_gone_on_with(server: str, tmp_path: Path) -> None:
    for name, held in (("a.tar", 1000), ("plain.tar", 1000), ("a.tar", len(BODY))):
        folder = tmp_path / f"{name}-{held}"
        folder.mkdir()
        (folder / f".{name}.partial").write_bytes(BODY[:held])
        assert fetch(f"{server}/{name}", folder).read_bytes() == BODY
    assert Server.asked == ["bytes=1000-", "bytes=1000-", f"bytes={len(BODY)}-"]


def test_a_shard_cut_short_is_no_shard(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be had"):
        fetch(f"{server}/short.tar", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".short.tar.partial"]


def test_what_is_not_there(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="404"):
        fetch(f"{server}/none.tar", tmp_path)
    with pytest.raises(DataError, match="cannot be had"):
        fetch("http://127.0.0.1:9/a.tar", tmp_path)
    with pytest.raises(DataError, match="cannot be opened"):
        fetch("nosuchstore://bucket/a.tar", tmp_path)
    with pytest.raises(DataError, match="cannot be had"):
        fetch("memory://nothing/here.tar", tmp_path)


@pytest.mark.parametrize("address", ["http://host/sets/", "http://host/", "http://host/..", ""])
def test_an_address_without_a_file_name(tmp_path: Path, address: str) -> None:
    with pytest.raises(DataError, match="names no file"):
        fetch(address, tmp_path)


@pytest.mark.parametrize(
    "address", ["http://host/my shard.tar", "http://host:a/b.tar", "http://[a/b.tar", "http://h/ä.tar"]
)
def test_an_address_that_is_none(tmp_path: Path, address: str) -> None:
    with pytest.raises(DataError, match="%20 and the like"):
        fetch(address, tmp_path)


def test_an_address_with_a_question(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="404"):
        fetch(f"{server}/b.tar?key=a/b", tmp_path)
    (tmp_path / "b.tar").write_bytes(BODY)
    assert fetch(f"{server}/b.tar?key=a/b", tmp_path) == tmp_path / "b.tar"


def test_an_answer_that_is_no_http(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as asked:
                asked.recv(1000)
                asked.sendall(b"hello\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DataError, match="cannot be had"):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/a.tar", tmp_path)
        thread.join()


def test_object_stores_by_fsspec(tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/b.tar", "wb") as file:
        file.write(BODY)
    assert fetch("memory://bucket/b.tar", tmp_path).read_bytes() == BODY


def test_hashes_are_kept_to(server: str, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    sums.write_text(f"{hashlib.sha256(BODY).hexdigest()}  sets/a.tar\n{'0' * 64} *plain.tar\n")
    hashes = read_hashes(sums)
    assert fetch(f"{server}/a.tar", tmp_path / "out", hashes).is_file()
    with pytest.raises(DataError, match="not what its SHA-256 says"):
        fetch(f"{server}/plain.tar", tmp_path / "out", hashes)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tar"]
    with pytest.raises(DataError, match="no SHA-256"):
        fetch(f"{server}/short.tar", tmp_path / "out", hashes)
    (tmp_path / "out/plain.tar").write_bytes(BODY)
    with pytest.raises(DataError, match="is there and is not what its SHA-256 says"):
        fetch(f"{server}/plain.tar", tmp_path / "out", hashes)
    assert fetch(f"{server}/a.tar", tmp_path / "out", hashes).is_file()
    for nothing in (b"nothing", "nothing".encode("utf-16")):
        sums.write_bytes(nothing)
        with pytest.raises(DataError, match="holds no line"):
            read_hashes(sums)
