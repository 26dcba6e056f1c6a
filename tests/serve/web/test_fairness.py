"""Many sockets of one address beside one of another, over a real server."""

from __future__ import annotations

import contextlib
import json
import threading
import time

from websockets.sync.client import connect

from onestill.pipeline import Pipeline
from onestill.serve.web.server import Settings
from tests.serve.client import serving
from tests.serve.conftest import Gated


def test_many_sockets_of_one_address_draw_little_more_than_one_of_another(gated: Gated) -> None:
    denoise = gated.denoise

    class Slow:
        """The network with a pause, so that a client's way is short beside a call."""

        def __getattr__(self, name: str) -> object:
            return getattr(gated, name)

        def denoise(self, *inputs: object) -> object:
            time.sleep(0.1)
            return denoise(*inputs)  # type: ignore[arg-type]

    slow: object = Slow()
    drawn: dict[str, int] = {"127.0.0.2": 0, "127.0.0.3": 0}
    lock = threading.Lock()
    ended = threading.Event()

    def draw_on(port: int, address: str) -> None:
        with connect(
            f"ws://127.0.0.1:{port}/v1/realtime", source_address=(address, 0), proxy=None, compression=None
        ) as socket:
            socket.recv(timeout=30)
            number = 0
            while not ended.is_set():
                socket.send(json.dumps({"id": number, "prompt": "a", "seed": number}))
                with contextlib.suppress(TimeoutError):
                    if isinstance(socket.recv(timeout=5), bytes):
                        with lock:
                            drawn[address] += 1
                number += 1

    with serving(Pipeline(slow), Settings()) as served:  # type: ignore[arg-type]
        addresses = ["127.0.0.2"] * 15 + ["127.0.0.3"]
        threads = [threading.Thread(target=draw_on, args=(served.port, address)) for address in addresses]
        for thread in threads:
            thread.start()
        time.sleep(4)
        ended.set()
        for thread in threads:
            thread.join(30)
    many, one = drawn["127.0.0.2"], drawn["127.0.0.3"]
    assert one >= 5
    assert many <= 3 * one, drawn  # by socket it would be 15 times; a busy machine delays the one's next request
