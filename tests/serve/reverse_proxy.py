"""A small reverse proxy on this machine, for tests of what stands behind one: it relays bytes, sockets included."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress


class _ReverseProxy:
    def __init__(self, port: int, below: str, strip: bool, headers: Mapping[str, str]) -> None:
        self._port, self._below, self._strip, self._headers = port, below, strip, headers

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, whose connection ends with its answer, or one socket."""
        try:
            await self._pass(reader, writer)
        finally:
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.rstrip().split("\r\n")
            method, path, version = first.split(" ")
            if not f"{path}/".startswith(f"{self._below}/"):
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            else:
                if self._strip:
                    path = path.removeprefix(self._below) or "/"
                upgrade = any(line.lower().startswith("upgrade:") for line in lines)
                own = {"connection", *self._headers}
                if upgrade:
                    own.discard("connection")
                lines = [line for line in lines if line.partition(":")[0].lower() not in own]
                lines += [f"{name}: {value}" for name, value in self._headers.items()]
                lines += [] if upgrade else ["connection: close"]
                behind, to = await asyncio.open_connection("127.0.0.1", self._port)
                to.write("\r\n".join([f"{method} {path} {version}", *lines, "", ""]).encode("latin-1"))
                try:
                    await asyncio.gather(_relay(reader, to), _relay(behind, writer))
                finally:
                    to.close()


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    with suppress(OSError, RuntimeError):
        writer.close()


@contextmanager
def reverse_proxy(
    port: int, below: str = "", strip: bool = True, headers: Mapping[str, str] | None = None
) -> Iterator[int]:
    """Yields the port of a proxy before the server at `port`.

    Args:
        port: the server's.
        below: the path that belongs to the server, such as "/draw"; any other is answered 404.
        strip: whether the server is asked for what follows that path.
        headers: lower-case names and values that replace a client's own, or are added.
    """
    loop = asyncio.new_event_loop()
    proxy = _ReverseProxy(port, below, strip, headers or {})
    listening = loop.run_until_complete(asyncio.start_server(proxy.serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:

        async def end() -> None:
            listening.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.05)  # for what was closed to end

        asyncio.run_coroutine_threadsafe(end(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()
