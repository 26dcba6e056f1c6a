"""What a proxy in front says of a request: the client's address, its scheme, and the path below which the server is.

Only proxies that the operator names are believed. Each proxy appends the address that it was asked from, so the right
end of a list is the proxies' own, and everything left of the first other address may be the client's invention.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from onestill.errors import OnestillError

__all__ = ["FromProxies", "TrustedProxies", "came_by_proxy", "read_prefix"]

UNKNOWN = "unknown"  # the client where a proxy names none, or two headers disagree: never this machine
MOST_HOPS = 32
PREFIX = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*){1,8}")
NAMING = ("x-forwarded-for", "forwarded", "x-real-ip", "via")


class TrustedProxies:
    """The proxies that are believed.

    Args:
        text: addresses and networks, separated by commas; "*" is whoever connects. None and "" trust nobody. In a list
            of hops only named addresses are proxies, so with "*" alone the client is the last entry.

    Raises:
        OnestillError: a part is neither an address nor a network.
    """

    def __init__(self, text: str | None) -> None:
        parts = [part.strip() for part in (text or "").split(",") if part.strip()]
        self._anyone = "*" in parts
        try:
            self._networks = [ipaddress.ip_network(part, strict=False) for part in parts if part != "*"]
        except ValueError as error:
            raise OnestillError(
                f"A trusted proxy is not understood ({error}); write addresses or networks, such as 10.0.0.0/8."
            ) from error

    def trusts(self, peer: str) -> bool:
        """Whether the headers of a connection from this address are believed."""
        return self._anyone or peer in self

    def __contains__(self, host: str) -> bool:
        try:
            found = ipaddress.ip_address(host)
        except ValueError:
            return False
        mapped = getattr(found, "ipv4_mapped", None)
        return any((mapped or found) in network for network in self._networks)

    def client(self, hops: Sequence[str]) -> tuple[str, int]:
        """The client in a list of hops, and its place in it, counted from the right and from 1."""
        hosts = [_host(hop) for hop in reversed(hops[-MOST_HOPS:])]
        place = next((i for i, host in enumerate(hosts) if host not in self), len(hosts) - 1)
        return hosts[place], place + 1


class FromProxies:
    """ASGI middleware that fills in the client, the scheme and the root path of each connection.

    It reads X-Forwarded-For, X-Forwarded-Proto, X-Forwarded-Prefix and `Forwarded` (RFC 7239). Most proxies write one
    kind and pass a client's other kind on, so where both name a client and disagree, the client is unknown.

    Args:
        app: the application behind it.
        trusted: whose headers are believed.
        root_path: the path below which the server is, such as "/draw"; "" takes X-Forwarded-Prefix. A proxy may leave
            it in the paths that it asks for, or take it off.
    """

    def __init__(self, app: ASGIApp, trusted: TrustedProxies, root_path: str = "") -> None:
        self._app, self._trusted, self._root_path = app, trusted, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on. The root path without its last slash leads to the one with it, as the page needs it."""
        if scope["type"] in ("http", "websocket"):
            scope = self._filled(scope)
            if scope["type"] == "http" and scope["path"] == scope["root_path"] != "":
                await RedirectResponse(f"{scope['root_path']}/", 308)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _filled(self, scope: Scope) -> Scope:
        root_path = self._root_path
        more: dict[str, Any] = {}
        peer = scope["client"][0] if scope.get("client") else ""
        if self._trusted.trusts(peer):
            headers = Headers(scope=scope)
            client, scheme = self._named(headers)
            if client is not None:
                more["client"] = (client, 0)
            if scheme in ("http", "https", "ws", "wss"):
                more["scheme"] = scheme.replace("http", "ws") if scope["type"] == "websocket" else scheme
            given = headers.get("x-forwarded-prefix", "").rstrip("/")
            if not root_path and PREFIX.fullmatch(given):
                root_path = given
        for name in ("path", "raw_path") if not f"{scope['path']}/".startswith(f"{root_path}/") else ():
            before = root_path if name == "path" else root_path.encode()
            more[name] = before + scope[name]
        return {**scope, **more, "root_path": root_path}

    def _named(self, headers: Headers) -> tuple[str | None, str]:
        """The client, None where no header names one, and the scheme that its proxy was asked by, or ""."""
        elements = [_pairs(element) for element in _list(headers, "forwarded")]
        lists = [_list(headers, "x-forwarded-for"), [element.get("for", "") for element in elements]]
        found = [self._trusted.client(hops) for hops in lists if hops]
        schemes = _list(headers, "x-forwarded-proto") or [element.get("proto", "") for element in elements]
        if not found:
            return None, schemes[-1] if schemes else ""
        same = len({host for host, _ in found}) == 1
        return found[0][0] if same else UNKNOWN, schemes[-min(found[0][1], len(schemes))] if schemes else ""


def read_prefix(text: str) -> str:
    """A root path as typed, without its last slash; "" and "/" are none.

    Raises:
        OnestillError: it is no path.
    """
    found = text.rstrip("/")
    if found and not PREFIX.fullmatch(found):
        raise OnestillError(f"The root path '{text}' is not understood; write it as a path, such as /draw.")
    return found


def came_by_proxy(headers: Headers) -> bool:
    """Whether a proxy says that it passed a request on, trusted or not."""
    return any(name in headers for name in NAMING)


def _list(headers: Headers, name: str) -> list[str]:
    """The entries of all headers of a name."""
    return [entry.strip() for value in headers.getlist(name) for entry in value.split(",")]


def _pairs(element: str) -> dict[str, str]:
    """The parameters of one element of `Forwarded`, as `for=192.0.2.1;proto=https`."""
    parts = (part.partition("=") for part in element.split(";"))
    return {name.strip().lower(): value.strip().strip('"') for name, _, value in parts}


def _host(hop: str) -> str:
    """The address in an entry, which may have a port; `UNKNOWN` where it has none."""
    match = re.fullmatch(r"\[([^\[\]]+)\](?::\d+)?|([^:]+):\d+", hop)
    try:
        return str(ipaddress.ip_address(match[1] or match[2] if match else hop))
    except ValueError:
        return UNKNOWN
