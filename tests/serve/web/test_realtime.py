from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from typing import Any

import PIL.Image
import pytest
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from onestill.pipeline import Pipeline
from onestill.serve.access.quota import Access
from onestill.serve.errors import ApiError
from onestill.serve.queue.scheduler import Limits
from onestill.serve.web.messages import pack
from onestill.serve.web.realtime import converse
from onestill.serve.web.requests import Bounds
from onestill.serve.web.server import Server, Settings
from tests.serve.client import Served, answer_on, serving
from tests.serve.conftest import Gated
from tests.serve.pictures import bomb, png


def ask(socket: Any, name: int, prompt: str = "a red apple", **fields: Any) -> None:
    socket.send(json.dumps({"id": name, "prompt": prompt, **fields}))


def test_ready_tells_the_limits(served: Served) -> None:
    with served.live(ready=False) as socket:
        ready = json.loads(socket.recv(timeout=20))
    assert ready["type"] == "ready"
    assert ready["model"] == "tiny"
    assert ready["limits"]["sizes"] == ["32x32"]


def test_a_message_is_answered_with_its_picture(served: Served) -> None:
    with served.live() as socket:
        ask(socket, 7, seed=3, num_inference_steps=2, size="32x32", format="png")
        header, data = answer_on(socket)
    timings = header.pop("timings")
    assert set(timings) == {"queue_ms", "encode_ms", "denoise_ms", "decode_ms", "compress_ms", "total_ms"}
    assert timings["total_ms"] >= sum(ms for name, ms in timings.items() if name != "total_ms") - 0.1
    assert header == {"type": "image", "id": 7, "seed": 3, "width": 32, "height": 32, "format": "png"}
    picture: Any = PIL.Image.open(io.BytesIO(data))
    assert (picture.format, picture.size, picture.text["seed"]) == ("PNG", (32, 32), "3")


def test_four_variations_come_in_one_answer(served: Served) -> None:
    with served.live() as socket:
        ask(socket, 1, n=4, seed=10)
        header, data = answer_on(socket)
    assert header["seeds"] == [10, 11, 12, 13]
    assert sum(header["lengths"]) == len(data)
    start = 0
    for length in header["lengths"]:
        assert PIL.Image.open(io.BytesIO(data[start : start + length])).format == "JPEG"
        start += length


def test_a_binary_message_brings_the_picture_to_start_from(served: Served) -> None:
    with served.live() as socket:
        answers = []
        for name, colour in enumerate(("red", "blue")):
            socket.send(
                pack({"id": name, "prompt": "a", "seed": 1, "strength": 0.2, "format": "png"}, png(colour=colour))
            )
            header, data = answer_on(socket)
            assert (header["type"], header["id"]) == ("image", name)
            answers.append(data)
        assert answers[0] != answers[1]
        socket.send(pack({"id": 9, "prompt": "a"}, bomb()))
        assert answer_on(socket)[0]["error"]["code"] == "image_too_large"


def test_every_id_is_answered_once_and_the_last_with_a_picture(gated: Gated) -> None:
    with serving(Pipeline(gated), Settings()) as served, served.live() as socket:
        gated.hold()
        ask(socket, 0, "a")
        gated.wait_reached()
        for name in range(1, 20):
            ask(socket, name, f"a red apple {name}")
        time.sleep(0.2)
        gated.gate.set()
        answers = [answer_on(socket)[0] for _ in range(20)]
    assert sorted(answer["id"] for answer in answers) == list(range(20))
    kinds = {answer["id"]: answer["type"] for answer in answers}
    assert (kinds[0], kinds[19]) == ("image", "image")
    assert [kinds[name] for name in range(1, 19)] == ["superseded"] * 18
    pictures = [answer["id"] for answer in answers if answer["type"] == "image"]
    assert pictures == sorted(pictures)  # never an older picture after a newer one


@pytest.mark.parametrize(
    ("message", "name", "code"),
    [
        ("", None, "invalid_body"),
        ("{", None, "invalid_body"),
        ("[" * 60_000, None, "invalid_body"),
        ("[" * 100_000, None, "too_large"),
        ("[]", None, "invalid_body"),
        ("7", None, "invalid_body"),
        (b"", None, "invalid_body"),
        (b"\xff\xff\xff\xff", None, "invalid_body"),
        (b"\x00\x00\x00\x02\xff\xff", None, "invalid_body"),
        ('{"prompt": "a"}', None, "invalid_value"),
        ('{"id": "1", "prompt": "a"}', None, "invalid_value"),
        ('{"id": -1, "prompt": "a"}', None, "invalid_value"),
        ('{"id": 1e400, "prompt": "a"}', None, "invalid_value"),
        ('{"id": NaN, "prompt": "a"}', None, "invalid_value"),
        ('{"id": 3}', 3, "invalid_value"),
        ('{"id": 3, "prompt": ""}', 3, "invalid_value"),
        ('{"id": 3, "prompt": "\\ud800"}', 3, "invalid_value"),
        ('{"id": 3, "prompt": "a", "n": 5}', 3, "invalid_value"),
        ('{"id": 3.0, "prompt": "a", "seeds": 5}', 3, "unknown_parameter"),
    ],
)
def test_a_wrong_message_is_answered_and_forgiven(served: Served, message: Any, name: int | None, code: str) -> None:
    with served.live() as socket:
        socket.send(message)
        answer = answer_on(socket)[0]
        assert (answer["type"], answer["id"], answer["error"]["code"]) == ("error", name, code)
        ask(socket, 1)
        assert answer_on(socket)[0]["type"] == "image"


def test_too_many_messages_a_second_are_answered_with_that(tiny_pipe: Pipeline) -> None:
    settings = Settings(bounds=Bounds(messages_each_s=5))
    with serving(tiny_pipe, settings) as served, served.live() as socket:
        for name in range(30):
            ask(socket, name)
        answers = [answer_on(socket)[0] for _ in range(30)]
        assert sorted(answer["id"] for answer in answers) == list(range(30))
        refused = [answer["error"]["code"] for answer in answers if answer["type"] == "error"]
        assert len(refused) >= 15
        assert set(refused) == {"rate_limit"}
        time.sleep(1)
        ask(socket, 99)
        assert answer_on(socket)[0]["type"] == "image"


def test_a_message_beyond_the_bound_ends_the_connection(tiny_pipe: Pipeline) -> None:
    with serving(tiny_pipe, Settings(bounds=Bounds(message=10_000))) as served, served.live() as socket:
        ask(socket, 1, "a" * 1_000_000)
        with pytest.raises(ConnectionClosed) as closed:
            answer_on(socket)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        assert served.ask("GET", "/readyz").status == 200


def test_more_connections_than_allowed_are_told_so(tiny_pipe: Pipeline) -> None:
    with serving(tiny_pipe, Settings(bounds=Bounds(live_each=2))) as served:
        with served.live(), served.live(), served.live(ready=False) as third:
            assert answer_on(third)[0]["error"]["code"] == "too_many_connections"
            with pytest.raises(ConnectionClosed) as closed:
                third.recv(timeout=20)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013
        for _ in range(100):
            if not served.server.live.total():
                break
            time.sleep(0.02)
        with served.live():
            pass


def knock(server: Server, address: str) -> list[Any]:
    """What a connection from an address is sent before it ends."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(
        converse(server, WebSocket({"type": "websocket", "client": (address, 1), "headers": []}, receive, send))
    )
    return sent


def test_a_connection_counts_for_its_household_and_before_it_is_known_whose_it_is(tiny_pipe: Pipeline) -> None:
    seen: list[int] = []

    class Nobody(Access):
        async def identify(self, connection: Any, key: str | None = None) -> Any:
            seen.append(server.live["2001:db8:1:2::"])
            raise ApiError(401, "Nobody may.", "no_api_key")

    server = Server(tiny_pipe, Settings(bounds=Bounds(live_each=1)), Nobody())
    assert knock(server, "2001:db8:1:2::3")[-1]["code"] == 1008
    assert seen == [1]
    assert not server.live
    server.live["2001:db8:1:2::"] = 1
    assert "too_many_connections" in knock(server, "2001:db8:1:2:ffff::4")[1]["text"]
    server.close()


def test_what_fails_on_the_way_is_answered_and_logged(tiny_pipe: Pipeline, caplog: Any) -> None:
    def prompt_filter(prompt: str) -> None:
        assert prompt != "words"

    def image_filter(images: Any) -> list[bool]:
        raise RuntimeError("/secret/path")

    settings = Settings(prompt_filter=prompt_filter, image_filter=image_filter)
    with serving(tiny_pipe, settings) as served, served.live() as socket:
        for name, prompt in enumerate(("words", "a", "a")):
            ask(socket, name, prompt)
            answer = answer_on(socket)[0]
            assert (answer["id"], answer["error"]["code"], answer["error"]["type"]) == (
                name,
                "server_fault",
                "server_error",
            )
            assert "secret" not in json.dumps(answer)
    assert caplog.text.count("RuntimeError: /secret/path") == 2


def test_a_foreign_page_is_refused_before_anything(served: Served) -> None:
    with pytest.raises(InvalidStatus) as refused, served.live(origin="https://evil.example"):
        pass
    assert refused.value.response.status_code == 403
    with served.live(origin=f"http://127.0.0.1:{served.port}"):
        pass


def test_one_who_leaves_frees_the_model(gated: Gated) -> None:
    with serving(Pipeline(gated), Settings()) as served:
        gated.hold()
        with served.live() as socket:
            ask(socket, 1, num_inference_steps=50)
            gated.wait_reached()
        time.sleep(0.3)
        gated.gate.set()
        assert served.draw(seed=1).status == 200
        assert len(gated.batches) <= 3


def test_a_client_that_never_reads_harms_nobody(tiny_pipe: Pipeline) -> None:
    settings = Settings(limits=Limits(), bounds=Bounds(messages_each_s=100_000))
    with serving(tiny_pipe, settings) as served, served.live(max_queue=1) as deaf:
        stop = threading.Event()

        def shout() -> None:
            name = 0
            while not stop.is_set() and name < 5000:
                try:
                    ask(deaf, name, "a" * 300)
                except (ConnectionClosed, OSError):
                    return
                name += 1

        shouting = threading.Thread(target=shout, daemon=True)
        shouting.start()
        for name in range(5):
            with served.live() as socket:
                ask(socket, name)
                assert answer_on(socket)[0]["type"] == "image"
        assert served.ask("GET", "/readyz").status == 200
        stop.set()
        deaf.socket.close()
        shouting.join(20)
