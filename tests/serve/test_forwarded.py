from __future__ import annotations

import asyncio
from typing import Any

import pytest

from onestill.errors import OnestillError
from onestill.serve.forwarded import FromProxies, TrustedProxies, read_prefix


def seen(
    trusted: str | None,
    headers: dict[str, str],
    peer: str = "10.0.0.2",
    path: str = "/",
    root_path: str = "",
    **more: Any,
) -> Any:
    """The scope that an application behind the middleware gets, or the answer where it gets none."""
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(scope)

    async def send(message: Any) -> None:
        found.append(message)

    scope = {
        "type": "http",
        "client": (peer, 5),
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        **more,
    }
    asyncio.run(FromProxies(app, TrustedProxies(trusted), root_path)(scope, None, send))  # type: ignore[arg-type]
    return found[0]


@pytest.mark.parametrize(
    ("trusted", "said", "client"),
    [
        (None, "1.1.1.1", "10.0.0.2"),
        ("10.0.0.9", "1.1.1.1", "10.0.0.2"),
        ("10.0.0.2", "1.1.1.1", "1.1.1.1"),
        ("10.0.0.2", "9.9.9.9, 1.1.1.1", "1.1.1.1"),
        ("10.0.0.0/8", "9.9.9.9, 1.1.1.1, 10.0.0.7", "1.1.1.1"),
        ("10.0.0.0/8", "9.9.9.9, 10.0.0.6, 1.1.1.1, 10.0.0.7", "1.1.1.1"),
        ("10.0.0.0/8", "10.0.0.8, 10.0.0.7", "10.0.0.8"),  # the client is a proxy itself
        ("*", "9.9.9.9, 1.1.1.1", "1.1.1.1"),
        ("*", "127.0.0.1, 1.1.1.1", "1.1.1.1"),
        ("*, 10.0.0.0/8", "9.9.9.9, 1.1.1.1, 10.0.0.7", "1.1.1.1"),
        ("10.0.0.2", "1.1.1.1:4711", "1.1.1.1"),
        ("10.0.0.2", "[2001:db8::1]:4711", "2001:db8::1"),
        ("10.0.0.2", "2001:DB8:0::1", "2001:db8::1"),
        ("10.0.0.2", "1.1.1.1, _hidden", "unknown"),
        ("10.0.0.2", "", "unknown"),
        ("10.0.0.2", "1.1.1.1," * 4000 + "2.2.2.2", "2.2.2.2"),
    ],
)
def test_the_client_is_the_last_that_no_proxy_has(trusted: str | None, said: str, client: str) -> None:
    assert seen(trusted, {"x-forwarded-for": said})["client"][0] == client


def test_a_trusted_peer_may_be_written_as_ipv6() -> None:
    assert seen("10.0.0.2", {"x-forwarded-for": "1.1.1.1"}, "::ffff:10.0.0.2")["client"][0] == "1.1.1.1"
    assert seen("fd00::/8", {"x-forwarded-for": "1.1.1.1, fd00::2"}, "fd00::1")["client"][0] == "1.1.1.1"
    assert seen("10.0.0.2", {}, "")["client"][0] == ""


def test_the_standard_header_names_the_client_too() -> None:
    standard = {"forwarded": 'for="[2001:db8::1]:4711";proto=https, for=10.0.0.7;proto=http'}
    found = seen("10.0.0.0/8", standard)
    assert (found["client"][0], found["scheme"]) == ("2001:db8::1", "https")
    assert seen("10.0.0.9", standard)["client"][0] == "10.0.0.2"
    assert seen("*", {"forwarded": 'for="1.2.3.4, for=1.1.1.1'})["client"][0] == "1.1.1.1"
    agreed = {"forwarded": "for=1.1.1.1", "x-forwarded-for": "1.1.1.1"}
    assert seen("*", agreed)["client"][0] == "1.1.1.1"
    # A proxy that writes one of the two passes the other on as the client sent it.
    assert seen("*", agreed | {"forwarded": "for=127.0.0.1"})["client"][0] == "unknown"
    assert seen("*", agreed | {"x-forwarded-for": "127.0.0.1"})["client"][0] == "unknown"


def test_the_scheme_is_the_one_that_the_client_used() -> None:
    for said, scheme in (("https", "https"), ("http", "http"), ("gopher", "http"), ("", "http")):
        assert seen("10.0.0.2", {"x-forwarded-proto": said})["scheme"] == scheme
    both = {"x-forwarded-for": "9.9.9.9, 1.1.1.1, 10.0.0.7", "x-forwarded-proto": "http, https, http"}
    assert seen("10.0.0.0/8", both)["scheme"] == "https"
    assert seen("10.0.0.2", {"x-forwarded-proto": "https"}, type="websocket", scheme="ws")["scheme"] == "wss"
    assert seen(None, {"x-forwarded-proto": "https"})["scheme"] == "http"


@pytest.mark.parametrize(
    ("path", "full"),
    [
        ("/", "/draw/"),
        ("/v1/models", "/draw/v1/models"),
        ("/draw/v1/models", "/draw/v1/models"),
        ("/drawn", "/draw/drawn"),
    ],
)
def test_a_root_path_may_be_left_in_or_taken_off(path: str, full: str) -> None:
    found = seen(None, {}, path=path, root_path="/draw")
    assert (found["path"], found["raw_path"], found["root_path"]) == (full, full.encode(), "/draw")


def test_the_root_path_itself_leads_to_the_page() -> None:
    answer = seen(None, {}, path="/draw", root_path="/draw")
    assert (answer["status"], dict(answer["headers"])[b"location"]) == (308, b"/draw/")


def test_a_prefix_is_taken_from_trusted_proxies_alone() -> None:
    for said, root in [("/draw", "/draw"), ("/a/b-c.d/", "/a/b-c.d"), ("/", ""), ("", "")]:
        assert seen("10.0.0.2", {"x-forwarded-prefix": said})["root_path"] == root
    for said in ("//evil.example", "draw", "/a/../b", '/"><script>', "/a, /b", "https://evil.example", "/a?b", "/a\\b"):
        assert seen("10.0.0.2", {"x-forwarded-prefix": said})["root_path"] == "", said
    assert seen(None, {"x-forwarded-prefix": "/draw"})["root_path"] == ""
    assert seen("10.0.0.2", {"x-forwarded-prefix": "/other"}, root_path="/draw")["root_path"] == "/draw"


def test_mistakes_of_the_operator_are_told() -> None:
    for text in ("proxy", "10.0.0.1/33", "10.0.0.1 10.0.0.2"):
        with pytest.raises(OnestillError, match="addresses or networks"):
            TrustedProxies(text)
    assert [read_prefix(text) for text in ("", "/", "/draw", "/draw/")] == ["", "", "/draw", "/draw"]
    for text in ("draw", "//draw", "/a b", "/.."):
        with pytest.raises(OnestillError, match="such as /draw"):
            read_prefix(text)
