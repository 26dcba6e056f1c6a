"""Those who mean harm, each in a process of its own: `python -m benchmarks.serve.attackers NAME PORT`; see `attack`.

They attack a server on the loopback interface until they are killed, at the lowest priority, as strangers would not use
the server's processors. `address` is the last part of 127.0.0.X.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator

HOST_LINE = b"host: localhost\r\n"
UPGRADE = (
    b"GET /v1/realtime HTTP/1.1\r\n" + HOST_LINE + b"upgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
SIDE = 4000  # pixels of the largest upload that is allowed


# --- files ------------------------------------------------------------------------------------------------------------


def jpeg(scans: int) -> bytes:
    """A progressive JPEG of 16 megapixels, whose scans say nothing."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    blocks = (SIDE // 8) ** 2
    bits = ""
    while blocks > 0:  # runs of blocks without a coefficient
        run = min(blocks, 2**15 - 1)
        bits += "0" + format(max(run, 2**14) - 2**14, "014b")
        blocks -= max(run, 2**14)
    bits += "1" * (-len(bits) % 8)
    coded = b"".join(b"\xff\0" if (v := int(bits[i : i + 8], 2)) == 255 else bytes([v]) for i in range(0, len(bits), 8))
    head = segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, struct.pack(">BHHB", 8, SIDE, SIDE, 1) + b"\1\x11\0")
    head += segment(0xC4, b"\0\1" + bytes(15) + b"\0") + segment(0xC4, b"\x10\1\1" + bytes(14) + b"\xe0\0")
    first = segment(0xDA, b"\1\1\0\0\0\0") + bytes((SIDE // 8) ** 2 // 8 + 1)
    return b"\xff\xd8" + head + first + (segment(0xDA, b"\1\1\x10\1\x3f\x10") + coded) * scans + b"\xff\xd9"


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(more: bytes = b"", side: int = SIDE) -> bytes:
    """A white PNG, with other chunks after its header."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    rows = zlib.compress((b"\0" + b"\xff" * (3 * side)) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", rows) + chunk(b"IEND")


# --- connections ------------------------------------------------------------------------------------------------------


def connected(port: int, address: int, hello: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), 30, (f"127.0.0.{address}", 0))
    if hello:
        client.sendall(hello)
        answer = b""
        while not answer.endswith(b"\r\n\r\n") and (more := client.recv(1)):
            answer += more
    return client


def frame(kind: int, data: bytes) -> bytes:
    """A frame of a WebSocket; its mask is zero."""
    size = len(data)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 2**16:
        length = b"\xfe" + struct.pack(">H", size)
    else:
        length = b"\xff" + struct.pack(">Q", size)
    return bytes([0x80 | kind]) + length + bytes(4) + data


def message(number: int, upload: bytes = b"", **fields: object) -> bytes:
    """A live message that asks for a picture."""
    text = json.dumps({"id": number, "prompt": f"a red apple {number}", "seed": 1, **fields}).encode()
    return frame(2, len(text).to_bytes(4, "big") + text + upload) if upload else frame(1, text)


def form(upload: bytes) -> bytes:
    """A request to change a picture."""
    body = b'--XX\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na red apple\r\n--XX\r\n'
    body += b'content-disposition: form-data; name="image"; filename="a"\r\n\r\n' + upload + b"\r\n--XX--\r\n"
    return (
        b"POST /v1/images/edits HTTP/1.1\r\n" + HOST_LINE + b"connection: close\r\n"
        b"content-type: multipart/form-data; boundary=XX\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )


def again(attack: Callable[[], None]) -> None:
    """Attack for ever, in a thread, also where the server closes the connection or refuses it."""

    def loop() -> None:
        while True:
            try:
                attack()
            except OSError:
                time.sleep(0.1)

    threading.Thread(target=loop, daemon=True).start()


def drained(client: socket.socket) -> None:
    """Read and forget, in a thread, so that the server can write."""

    def read() -> None:
        try:
            while client.recv(2**16):
                pass
        except OSError:
            pass

    threading.Thread(target=read, daemon=True).start()


def flood(port: int, address: int, hello: bytes, pieces: Iterator[bytes], *, reads: bool = True) -> None:
    """One connection that sends as fast as it can."""
    with connected(port, address, hello) as client:
        client.settimeout(30)
        if reads:
            drained(client)
        for piece in pieces:
            client.sendall(piece)


def forever(data: bytes) -> Iterator[bytes]:
    while True:
        yield data


# --- the attacks ------------------------------------------------------------------------------------------------------


def uploads(port: int, files: list[bytes], clients: int) -> None:
    def post(address: int, file: bytes) -> Callable[[], None]:
        request = form(file)

        def attack() -> None:
            with connected(port, address) as client:
                client.sendall(request)
                client.recv(2**16)

        return attack

    for i in range(clients):
        again(post(10 + i, files[i % len(files)]))


def scan_bombs(port: int) -> None:
    """JPEGs of 33 to 62 KB with 60 and 1,000 scans over 16 megapixels, from four addresses."""
    uploads(port, [jpeg(60), jpeg(1000)], 4)


def huge_metadata(port: int) -> None:
    """Files of 11 MB: empty comments in a JPEG, empty chunks in a PNG, from four addresses."""
    many = 11 * 2**20
    comments = b"\xff\xd8" + b"\xff\xfe\0\2" * (many // 4) + jpeg(1)[2:]
    uploads(
        port, [comments, png(chunk(b"tEXt") * (many // 12), side=64), png(chunk(b"IDAT") * (many // 12), side=64)], 4
    )


def large_pngs(port: int) -> None:
    """PNGs of 16 megapixels on eight live connections of eight addresses."""
    file = png()
    for i in range(8):
        again(lambda i=i: flood(port, 10 + i, UPGRADE, (message(n, file) for n in range(10**6))))


def tiny_chunks(port: int) -> None:
    """Bodies in chunks of one byte on four connections, as fast as the server takes them."""
    hello = (
        b"POST /v1/images/edits HTTP/1.1\r\n" + HOST_LINE + b"content-type: multipart/form-data; boundary=XX\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )

    def attack(i: int) -> None:
        with connected(port, 10 + i) as client:
            client.sendall(hello)
            for piece in forever(b"1\r\nx\r\n" * 10_000):
                client.sendall(piece)

    for i in range(4):
        again(lambda i=i: attack(i))


def pings(port: int) -> None:
    """Pings, and frames of one byte, on four live connections each, as fast as the server takes them."""
    for i in range(4):
        again(lambda i=i: flood(port, 10 + i, UPGRADE, forever(frame(9, b"") * 10_000)))
        again(lambda i=i: flood(port, 20 + i, UPGRADE, forever(frame(1, b"x") * 10_000)))


def idle(port: int) -> None:
    """2,050 connections of one address that ask nothing; each that is closed is opened again."""
    kept = [connected(port, 10) for _ in range(2050)]

    def attack() -> None:
        for i, client in enumerate(kept):
            client.setblocking(False)
            try:
                closed = client.recv(1) == b""
            except BlockingIOError:
                closed = False
            except OSError:
                closed = True
            if closed:
                client.close()
                kept[i] = connected(port, 10)
        time.sleep(0.1)

    again(attack)


def never_read(port: int) -> None:
    """Sixteen live connections and eight API clients that ask for four PNGs at a time, and read nothing."""
    body = json.dumps({"prompt": "a red apple", "n": 4}).encode()
    request = (
        b"POST /v1/images/generations HTTP/1.1\r\n" + HOST_LINE + b"content-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body
    )
    asks = lambda: (message(n, n=4, format="png") for n in range(10**6))  # noqa: E731
    for i in range(16):
        again(lambda i=i: flood(port, 10 + i // 4, UPGRADE, asks(), reads=False))
    for i in range(8):
        again(lambda i=i: flood(port, 20 + i // 4, b"", forever(request), reads=False))


def one_address(port: int) -> None:
    """31 live connections of one address that ask for four pictures at a time."""
    for _ in range(31):
        again(lambda: flood(port, 10, UPGRADE, slowly(message(n, n=4) for n in range(10**6))))


def slowly(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        time.sleep(0.05)
        yield piece


def large_bodies(port: int) -> None:
    """Sixty forms of 11 MB that do not end, and JSON of 11 MB, from ten addresses."""
    whole = form(bytes(11 * 2**20))
    head = (
        b"POST /v1/images/generations HTTP/1.1\r\n" + HOST_LINE + b"content-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % 11_000_000
    )

    def attack(i: int) -> None:
        with connected(port, 10 + i % 10) as client:
            client.sendall(whole[:-10])
            client.recv(1000)

    for i in range(60):
        again(lambda i=i: attack(i))
    for i in range(4):
        again(lambda i=i: flood(port, 10 + i, b"", iter([head, bytes(11_000_000)])))


ATTACKS = {
    attack.__name__: attack
    for attack in (
        *(scan_bombs, large_pngs, huge_metadata, tiny_chunks, pings, idle, never_read, one_address, large_bodies),
    )
}


def main() -> None:
    name, port = sys.argv[1], int(sys.argv[2])
    os.nice(19)
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ATTACKS[name](port)
    print("ready", flush=True)
    threading.Event().wait(600)


if __name__ == "__main__":
    main()
