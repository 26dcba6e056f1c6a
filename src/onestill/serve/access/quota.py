"""Who asks, and how many pictures they may draw: by key, or in a free trial.

A visitor without a key is known by a signed cookie and by address. Both are counted, so that neither a new cookie nor
another browser starts a new trial. Addresses and owners are stored only as keyed hashes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import math
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import HTTPConnection

from onestill.serve.access.keys import KEY_FORM, Key, hash_of
from onestill.serve.errors import ApiError, Unavailable

if TYPE_CHECKING:
    from onestill.serve.access.ledger import Ledger

__all__ = ["COOKIE", "COOKIE_S", "Access", "Visitor", "network"]

COOKIE = "onestill_visitor"
COOKIE_S = 400 * 24 * 3600  # browsers keep no cookie for longer
KEY_CACHE_S = 5.0  # how long a key that was looked up is trusted: a revoked one is refused after that
T = TypeVar("T")
EACH_ADDRESS = 4  # trials, as a household or a school may share an address


@dataclass(frozen=True)
class Visitor:
    """Who asks.

    Attributes:
        name: the client of the fair queue; not for display.
        accounts: the accounts on which pictures are counted, each with its pictures a day.
        owner: who owns what the visitor publishes; "" owns nothing.
        address: the keyed hash of the address of a visitor without a key.
        client: which of the visitor's connections or programs asks; not for display.
    """

    name: str
    accounts: tuple[tuple[str, int], ...] = ()
    owner: str = ""
    address: str = ""
    client: str = field(default="", compare=False)

    @property
    def source(self) -> str:
        """Where from: the address where there is one, as a visitor can get a new cookie at any time; else the key."""
        return self.address or self.name


class Access:
    """Identifies visitors, and counts their pictures.

    Args:
        file_keys: keys from a file, by id; they draw any number.
        ledger: the database of keys and counts; None has neither.
        trial: pictures a day for those without a key; None is any number, 0 none at all.
    """

    def __init__(
        self, file_keys: Mapping[str, Key] | None = None, ledger: Ledger | None = None, trial: int | None = None
    ) -> None:
        self._file_keys = dict(file_keys or {})
        self._ledger = ledger
        self.trial = trial
        self._secret = ledger.secret() if ledger is not None else secrets.token_bytes(32)
        self._cached: dict[str, tuple[float, Key | None]] = {}
        # One thread, as SQLite has one writer: waiting here is cheaper than waiting there.
        self._pool = ThreadPoolExecutor(1, "onestill-ledger")

    def close(self) -> None:
        """Close the database."""
        self._pool.shutdown(wait=True)
        if self._ledger is not None:
            self._ledger.close()

    # --- who ---------------------------------------------------------------------------------------------------------

    async def identify(self, connection: HTTPConnection, key: str | None = None) -> Visitor:
        """The visitor at the other end.

        Args:
            connection: a request or socket.
            key: a key that came in another way than in `Authorization: Bearer`.

        Raises:
            ApiError: 401, the key is not valid, or one is needed.
        """
        scheme, _, bearer = connection.headers.get("authorization", "").partition(" ")
        given = key or (bearer.strip() if scheme.lower() == "bearer" else None)
        if given is not None and (self._file_keys or self._ledger is not None):
            found = await self._valid_key(given)
            if found is not None:
                accounts = () if found.daily is None else ((f"key:{found.id}", found.daily),)
                return Visitor(f"key:{found.id}", accounts, f"key:{found.id}", client=_client_of(connection))
            raise ApiError(401, "This key is not valid; check it, or ask for a new one.", "invalid_api_key")
        if self.trial == 0:
            raise ApiError(401, "This server needs a key; send it as 'Authorization: Bearer ...'.", "no_api_key")
        return replace(self._anonymous(connection), client=_client_of(connection))

    async def _valid_key(self, given: str) -> Key | None:
        match = KEY_FORM.fullmatch(given)
        found = None if match is None else self._file_keys.get(match[1]) or await self._look_up(match[1])
        # Compared even where there is no such key, so that the time it takes reveals nothing.
        expected = found.hashed if found is not None else "0" * 64
        return found if hmac.compare_digest(hash_of(given), expected) and found is not None else None

    async def _look_up(self, key_id: str) -> Key | None:
        if self._ledger is None:
            return None
        at, cached = self._cached.get(key_id, (-KEY_CACHE_S, None))
        if time.monotonic() - at < KEY_CACHE_S:
            return cached
        found = await self.in_pool(self._ledger.find_key, key_id)
        if len(self._cached) > 1000:
            self._cached.clear()
        self._cached[key_id] = (time.monotonic(), found)
        return found

    def _anonymous(self, connection: HTTPConnection) -> Visitor:
        address = self.keyed_hash(network(connection.client.host if connection.client else ""))
        cookie = self._name_in(connection.cookies.get(COOKIE, ""))
        name = f"visitor:{cookie}" if cookie else f"address:{address}"
        owner = f"visitor:{cookie}" if cookie else ""
        if self.trial is None:
            return Visitor(name, (), owner, address)
        accounts = [(f"address:{address}", self.trial * EACH_ADDRESS if cookie else self.trial)]
        if cookie:
            accounts.append((f"visitor:{cookie}", self.trial))
        return Visitor(name, tuple(accounts), owner, address)

    def cookie_for(self, connection: HTTPConnection) -> str | None:
        """A new signed cookie for a browser that has no valid one, else None."""
        if self._name_in(connection.cookies.get(COOKIE, "")):
            return None
        name = secrets.token_hex(12)
        return f"{name}.{self.keyed_hash('cookie ' + name)}"

    def _name_in(self, cookie: str) -> str | None:
        name, _, signature = cookie.partition(".")
        good = hmac.compare_digest(signature.encode(), self.keyed_hash("cookie " + name).encode())
        return name if name and good else None

    def keyed_hash(self, text: str) -> str:
        """The keyed hash of a text that must not be stored itself."""
        return hmac.new(self._secret, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:32]

    # --- how much ----------------------------------------------------------------------------------------------------

    async def left(self, visitor: Visitor) -> int | None:
        """How many pictures the visitor may still draw today; None for any number."""
        tightest = await self._tightest(visitor)
        return None if tightest is None else tightest[0]

    async def rate_headers(self, visitor: Visitor) -> dict[str, str]:
        """OpenAI's headers on what is left, where there is a quota: a picture is a request, a day the period."""
        tightest = await self._tightest(visitor)
        return {} if tightest is None else _rate_headers(*tightest)

    async def _tightest(self, visitor: Visitor) -> tuple[int, int] | None:
        """Of the account with the fewest pictures left today, how many are left and its pictures a day."""
        if self._ledger is None or not visitor.accounts:
            return None
        used = await self.in_pool(self._ledger.used, [account for account, _ in visitor.accounts], _today())
        return min((max(0, daily - used.get(account, 0)), daily) for account, daily in visitor.accounts)

    async def check(self, visitor: Visitor, pictures: int) -> None:
        """Raise ApiError (429) where that many are more than are left. Counts nothing."""
        left = await self.left(visitor)
        if left is not None and left < pictures:
            raise self._over(visitor, left)

    async def spend(self, visitor: Visitor, pictures: int) -> None:
        """Count pictures before they are handed out. Raises ApiError (429) and counts none where they are too many."""
        if self._ledger is None or not visitor.accounts:
            return
        if not await self.in_pool(self._ledger.spend, visitor.accounts, pictures, _today()):
            raise self._over(visitor, 0)

    def _over(self, visitor: Visitor, left: int) -> ApiError:
        whose = "This key has" if visitor.name.startswith("key:") else "The free trial has"
        return ApiError(
            429,
            f"{whose} {left} pictures left today; the count starts again at midnight UTC.",
            "insufficient_quota",
            retry_after_s=_until_midnight_s(),
            headers=_rate_headers(left, min(daily for _, daily in visitor.accounts)),
        )

    async def why_not_ready(self) -> str | None:
        """Why nobody can be counted at present; None where everyone can."""
        try:
            if self._ledger is not None:
                await self.in_pool(self._ledger.check)
        except Unavailable:
            return "the database does not answer"
        return None

    async def in_pool(self, call: Callable[..., T], *arguments: Any) -> T:
        """The result of a call made in the database's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _until_midnight_s() -> float:
    now = datetime.now(UTC)
    return (datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC) - now).total_seconds()


def _rate_headers(left: int, daily: int) -> dict[str, str]:
    minutes, seconds = divmod(math.ceil(_until_midnight_s()), 60)
    return {
        "x-ratelimit-limit-requests": str(daily),
        "x-ratelimit-remaining-requests": str(left),
        "x-ratelimit-reset-requests": f"{minutes // 60}h{minutes % 60}m{seconds}s",
    }


def _client_of(connection: HTTPConnection) -> str:
    # A proxy hides the port; then what programs send distinguishes them.
    headers = connection.headers
    said = (headers.get("user-agent", ""), headers.get("authorization", ""))
    return f"{connection.client} {hashlib.sha256(repr(said).encode()).hexdigest()}"


def network(address: str) -> str:
    """The address that is counted: of an IPv6 address its network of 64 bits, which is one household's."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False).network_address)
    return str(found)
