from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute, APIWebSocketRoute
from websockets.exceptions import ConnectionClosed

from onestill.pipeline import Pipeline
from onestill.serve.access import quota as access_module
from onestill.serve.access.keys import Key, hash_of, new_key
from onestill.serve.access.ledger import Ledger
from onestill.serve.access.quota import COOKIE, Access
from onestill.serve.forwarded import TrustedProxies
from onestill.serve.run import ProxySettings
from onestill.serve.web.app import create_app
from onestill.serve.web.server import Server, Settings
from tests.serve.client import Answer, Served, answer_on, cookie_of, serving
from tests.serve.pictures import png

OPEN = {"/", "/web/{name}", "/v1/models", "/v1/models/{name}", "/healthz", "/readyz", "/metrics", "/openapi.json"}
DAY = "2026-11-24"


# --- every route, from the route table --------------------------------------------------------------------------------


def ask_route(served: Served, path: str, headers: dict[str, str]) -> Answer:
    """One request that the route would answer, were it not for who asks."""
    if path == "/v1/images/generations":
        return served.ask("POST", path, {"prompt": "a"}, headers)
    if path == "/v1/images/edits":
        return served.edit(png(), headers)
    return served.ask("GET", path.replace("{name}", "tiny"), None, headers)


def routes(pipe: Pipeline) -> tuple[list[str], list[str]]:
    server = Server(pipe, Settings())
    found = create_app(server).routes
    server.close()
    http, sockets = [], []

    def walk(routes: Any, prefix: str = "") -> None:
        for route in routes:
            if isinstance(route, APIWebSocketRoute):
                sockets.append(prefix + route.path)
            elif isinstance(route, APIRoute):
                http.append(prefix + route.path)
            elif hasattr(route, "original_router"):
                walk(route.original_router.routes, prefix)
            else:
                http.append(prefix + route.path)

    walk(found)
    return http, sockets


def test_the_route_table_is_known(tiny_pipe: Pipeline) -> None:
    http, sockets = routes(tiny_pipe)
    assert set(http) == OPEN | {"/v1/images/generations", "/v1/images/edits"}
    assert sockets == ["/v1/realtime"]


def test_every_route_without_a_key_with_a_wrong_one_and_with_a_revoked_one(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    good, revoked = ledger.add_key("me", None)[1], ledger.add_key("gone", None)
    assert ledger.revoke_key(revoked[0])
    wrong = [new_key()[1], good[:-1] + ("A" if good[-1] != "A" else "B"), revoked[1], "nonsense", good.upper(), ""]
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=0)) as served:
        for path in routes(tiny_pipe)[0]:
            expected = 200 if path in OPEN and path not in ("/v1/models/{name}", "/web/{name}") else None
            for key in [None, *wrong]:
                headers = {} if key is None else {"authorization": f"Bearer {key}"}
                answer = ask_route(served, path, headers)
                if path in OPEN:
                    assert answer.status in (200, 404), (path, key)
                    assert expected in (None, answer.status), (path, key)
                else:
                    assert answer.status == 401, (path, key)
                    assert answer.error["code"] == ("no_api_key" if key is None else "invalid_api_key")
                    assert answer.headers["www-authenticate"] == "Bearer"
            if path not in OPEN:
                assert ask_route(served, path, {"authorization": f"Bearer {good}"}).status == 200
        for protocol in ([], ["onestill.v1", "onestill.key.bm9uc2Vuc2U"], ["onestill.key.A"]):
            with served.live(ready=False, subprotocols=protocol or None) as socket:
                assert answer_on(socket)[0]["error"]["type"] == "authentication_error"
        assert served.server.scheduler.counts["drawn"] == 2
        import base64

        offered = ["onestill.v1", "onestill.key." + base64.urlsafe_b64encode(good.encode()).decode().rstrip("=")]
        with served.live(subprotocols=offered) as socket:
            assert socket.subprotocol == "onestill.v1"  # the key is not repeated
            socket.send('{"id": 1, "prompt": "a"}')
            assert answer_on(socket)[0]["type"] == "image"


def test_every_drawing_route_over_its_limit(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    key = ledger.add_key("me", 3)[1]
    headers = {"authorization": f"Bearer {key}"}
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=0)) as served:
        for path in ("/v1/images/generations", "/v1/images/edits"):
            assert ask_route(served, path, headers).status == 200
        with served.live(additional_headers=headers) as socket:
            for name in (1, 2, 3):
                socket.send(json.dumps({"id": name, "prompt": "a"}))
                answer = answer_on(socket)[0]
                if name == 1:
                    assert (answer["type"], answer["left"]) == ("image", 0)
                else:
                    assert (answer["id"], answer["error"]["code"]) == (name, "insufficient_quota")
                    assert 0 < answer["retry_after_s"] <= 24 * 3600
        for path in ("/v1/images/generations", "/v1/images/edits"):
            answer = ask_route(served, path, headers)
            assert (answer.status, answer.error["code"]) == (429, "insufficient_quota")
            assert 0 < int(answer.headers["retry-after"]) <= 24 * 3600
        assert ledger.list_keys()[0]["today"] == 3


def test_a_key_that_is_revoked_ends_its_live_connection(
    tiny_pipe: Pipeline, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "KEY_CACHE_S", 0.0)
    key_id, key = ledger.add_key("me", None)
    headers = {"authorization": f"Bearer {key}"}
    access = Access(ledger=ledger, trial=0)
    with serving(tiny_pipe, access=access) as served, served.live(additional_headers=headers) as socket:
        socket.send('{"id": 1, "prompt": "a"}')
        assert answer_on(socket)[0]["type"] == "image"
        assert ledger.revoke_key(key_id)
        socket.send('{"id": 2, "prompt": "a"}')
        answer = answer_on(socket)[0]
        assert (answer["id"], answer["error"]["code"]) == (2, "invalid_api_key")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=20)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert served.server.scheduler.counts["drawn"] == 1


def test_a_new_connection_draws_nothing_once_the_day_is_used_up(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=2)) as served:
        with served.live() as socket:
            for name, expected in ((1, "image"), (2, "image"), (3, "error")):
                socket.send(json.dumps({"id": name, "prompt": "a"}))
                assert answer_on(socket)[0]["type"] == expected
        with served.live() as socket:
            socket.send('{"id": 1, "prompt": "a", "n": 4}')
            assert answer_on(socket)[0]["error"]["code"] == "insufficient_quota"
        assert served.server.scheduler.counts["drawn"] == 2


# --- the free trial ---------------------------------------------------------------------------------------------------


def test_a_visitor_has_a_trial_by_cookie_and_by_address(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=2)) as served:

        def draw(cookie: str | None, n: int = 1) -> int:
            headers = {} if cookie is None else {"cookie": f"{COOKIE}={cookie}"}
            return served.ask("POST", "/v1/images/generations", {"prompt": "a", "n": n}, headers).status

        page = served.ask("GET", "/")
        assert {"HttpOnly", "SameSite=strict"} <= set(page.headers["set-cookie"].split("; "))
        first = cookie_of(page)
        assert "set-cookie" not in served.ask("GET", "/", headers={"cookie": f"{COOKIE}={first}"}).headers
        assert draw(first, 3) == 429  # all or none
        assert [draw(first), draw(first), draw(first)] == [200, 200, 429]
        # Every new cookie has its own trial, until the address has had four.
        second, third, fourth = (cookie_of(served.ask("GET", "/")) for _ in range(3))
        assert [draw(one, 2) for one in (second, third, fourth)] == [200, 200, 200]
        assert draw(cookie_of(served.ask("GET", "/"))) == 429
        assert draw(None) == 429


def test_a_forged_or_replayed_cookie_gains_nothing(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=1)) as served:
        good = cookie_of(served.ask("GET", "/"))
        name, _, signature = good.partition(".")
        forged = [f"{'0' * 24}.{signature}", f"{name}.{'0' * 32}", name, f"{name}.", ".", "", "a.b.c", "\xff.x"]
        for cookie in forged:
            headers = {"cookie": f"{COOKIE}={cookie}"}
            assert COOKIE in served.ask("GET", "/", headers=headers).headers["set-cookie"]
        headers = {"cookie": f"{COOKIE}={good}"}
        body = {"prompt": "a"}
        statuses = [served.ask("POST", "/v1/images/generations", body, headers).status for _ in range(3)]
        assert statuses == [200, 429, 429]
        # Without a valid cookie the address has one trial, which the cookie above has used.
        for cookie in forged:
            headers = {"cookie": f"{COOKIE}={cookie}"}
            assert served.ask("POST", "/v1/images/generations", body, headers).status == 429


def test_a_picture_that_is_not_drawn_is_not_counted(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=5)) as served:
        assert served.draw(n=4, size="1x1").status == 400
        assert served.draw(prompt="").status == 400
        assert served.draw(n=5).status == 200
        assert served.draw(n=1).status == 429


def test_addresses_are_not_kept(tiny_pipe: Pipeline, url: str, tmp_path: Path) -> None:
    ledger = Ledger(url)
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=5)) as served:
        served.draw()
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"address:" in kept
    assert b"127.0.0.1" not in kept


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::3", "2001:db8:1:2:ffff::1", True),
        ("2001:db8:1:2::3", "2001:db8:1:3::3", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
    ],
)
def test_a_household_of_ipv6_is_one_address(one: str, other: str, same: bool) -> None:
    assert (access_module.network(one) == access_module.network(other)) is same


# --- keys that expire, and wrong ones ---------------------------------------------------------------------------------


def test_an_expired_key_is_refused_and_says_so(tiny_pipe: Pipeline, ledger: Ledger) -> None:
    old, new = (ledger.add_key("me", None, f"{year}-02-01T00:00:00Z")[1] for year in (2020, 2999))
    file_key = Key("0a0a0a0a", "old", hash_of("os-0a0a0a0a-" + "x" * 27), expires="2020-02-01T00:00:00Z")
    with serving(tiny_pipe, access=Access({file_key.id: file_key}, ledger, trial=0)) as served:
        assert with_key(served, new).status == 200
        for key in (old, "os-0a0a0a0a-" + "x" * 27):
            answer = with_key(served, key)
            assert (answer.status, answer.error["code"]) == (401, "expired_api_key")
            assert "expired at 2020-02-01T00:00:00Z" in answer.error["message"]
            with served.live(ready=False, additional_headers={"authorization": f"Bearer {key}"}) as live:
                assert answer_on(live)[0]["error"]["code"] == "expired_api_key"
        # Only who has the whole key learns that.
        assert with_key(served, old[:-1] + ("A" if old[-1] != "A" else "B")).error["code"] == "invalid_api_key"


def test_a_key_expires_while_a_socket_is_open(
    tiny_pipe: Pipeline, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ledger.add_key("me", None, "2999-02-01T00:00:00Z")[1]
    with (
        serving(tiny_pipe, access=Access(ledger=ledger, trial=0)) as served,
        served.live(additional_headers={"authorization": f"Bearer {key}"}) as live,
    ):
        live.send('{"id": 1, "prompt": "a"}')
        assert answer_on(live)[0]["type"] == "image"
        monkeypatch.setattr(access_module, "has_passed", lambda at: at == "2999-02-01T00:00:00Z")
        live.send('{"id": 2, "prompt": "a"}')
        assert answer_on(live)[0]["error"]["code"] == "expired_api_key"
        with pytest.raises(ConnectionClosed) as closed:
            live.recv(timeout=20)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008


def with_key(served: Served, key: str, **headers: str) -> Answer:
    return served.ask("POST", "/v1/images/generations", {"prompt": "a"}, {"authorization": f"Bearer {key}", **headers})


def test_wrong_keys_are_throttled_by_address(
    tiny_pipe: Pipeline, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    find_key = ledger.find_key
    monkeypatch.setattr(ledger, "find_key", lambda name: looked_up.append(name) or find_key(name))
    monkeypatch.setattr(access_module, "WRONG_A_MINUTE", 3)
    good, unseen = ledger.add_key("me", None)[1], ledger.add_key("you", None)[1]
    proxy = ProxySettings(TrustedProxies("127.0.0.1"))
    guesser, other = {"x-forwarded-for": "1.1.1.1"}, {"x-forwarded-for": "2.2.2.2"}
    with serving(tiny_pipe, access=Access(ledger=ledger, trial=0), proxy=proxy) as served:
        assert with_key(served, good, **guesser).status == 200
        answers = [with_key(served, new_key()[1], **guesser) for _ in range(6)]
        assert [answer.status for answer in answers] == [401] * 3 + [429] * 3
        assert (answers[-1].error["code"], answers[-1].headers["retry-after"]) == ("rate_limit", "20")
        assert len(looked_up) == 4  # a guess beyond the limit asks the database nothing
        with served.live(ready=False, additional_headers={"authorization": "Bearer x", **guesser}) as live:
            assert answer_on(live)[0]["error"]["code"] == "rate_limit"
        # Neither a good guess nor a bad one is told from the other; who was known at this address still is.
        assert with_key(served, unseen, **guesser).status == 429
        assert with_key(served, good, **guesser).status == 200
        assert [with_key(served, key, **other).status for key in (unseen, new_key()[1])] == [200, 401]
