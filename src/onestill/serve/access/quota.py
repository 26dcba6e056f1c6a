"""Who asks, and how many pictures they may draw: by key, or in a free trial.

A visitor without a key is known by a signed cookie and by address. Both are counted, so that neither a new cookie nor
another browser starts a new trial. Addresses and owners are stored only as keyed hashes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import HTTPConnection

from onestill.serve.access.keys import KEY_FORM, Key, hash_of
from onestill.serve.errors import ApiError

if TYPE_CHECKING:
    from onestill.serve.access.ledger import Ledger

__all__ = ["COOKIE", "COOKIE_S", "Access", "Visitor", "network"]

COOKIE = "onestill_visitor"
COOKIE_S = 400 * 24 * 3600  # as long as browsers keep any
KEY_REMEMBERED_S = 5.0  # so a revoked key is refused after that
T = TypeVar("T")
OF_ONE_ADDRESS = 4  # trials: some addresses are a household, some a school


@dataclass(frozen=True)
class Visitor:
    """Who asks.

    Attributes:
        name: tells one from another for fair turns; not for display.
        accounts: what is counted, account -> pictures a day.
        owner: who may delete what was saved, "" for nobody.
        address: where someone without a key asks from, hidden.
    """

    name: str
    accounts: tuple[tuple[str, int], ...] = ()
    owner: str = ""
    address: str = ""


class Access:
    """Decides who may draw, and counts.

    Args:
        file_keys: keys from a file, by id; they draw any number.
        ledger: where keys and counts are kept; None for neither.
        trial: pictures a day for those without a key; None is any number, 0 none at all.
    """

    def __init__(
        self, file_keys: Mapping[str, Key] | None = None, ledger: Ledger | None = None, trial: int | None = None
    ) -> None:
        self._file_keys = dict(file_keys or {})
        self._ledger = ledger
        self.trial = trial
        self._secret = ledger.secret() if ledger is not None else secrets.token_bytes(32)
        self._known: dict[str, tuple[float, Key | None]] = {}
        # One thread, as SQLite has one writer: waiting here is cheaper than waiting there.
        self._pool = ThreadPoolExecutor(1, "onestill-ledger")

    def close(self) -> None:
        """Let go of the database."""
        self._pool.shutdown(wait=True)
        if self._ledger is not None:
            self._ledger.close()

    # --- who ---------------------------------------------------------------------------------------------------------

    async def identify(self, connection: HTTPConnection, key: str | None = None) -> Visitor:
        """Who is at the other end.

        Args:
            connection: a request or socket.
            key: one that came another way than in `Authorization: Bearer`.

        Raises:
            ApiError: 401, the key is not valid, or one is needed.
        """
        scheme, _, bearer = connection.headers.get("authorization", "").partition(" ")
        given = key or (bearer.strip() if scheme.lower() == "bearer" else None)
        if given is not None and (self._file_keys or self._ledger is not None):
            found = await self._checked(given)
            if found is not None:
                accounts = () if found.daily is None else ((f"key:{found.id}", found.daily),)
                return Visitor(f"key:{found.id}", accounts, f"key:{found.id}")
            raise ApiError(401, "This key is not valid; check it, or ask for a new one.", "invalid_api_key")
        if self.trial == 0:
            raise ApiError(401, "This server needs a key; send it as 'Authorization: Bearer ...'.", "no_api_key")
        return self._anonymous(connection)

    async def _checked(self, given: str) -> Key | None:
        match = KEY_FORM.fullmatch(given)
        found = None if match is None else self._file_keys.get(match[1]) or await self._stored(match[1])
        # Compared also where there is none, so that the time taken tells nothing.
        expected = found.hashed if found is not None else "0" * 64
        return found if hmac.compare_digest(hash_of(given), expected) and found is not None else None

    async def _stored(self, key_id: str) -> Key | None:
        if self._ledger is None:
            return None
        at, known = self._known.get(key_id, (-KEY_REMEMBERED_S, None))
        if time.monotonic() - at < KEY_REMEMBERED_S:
            return known
        found = await self.in_pool(self._ledger.find_key, key_id)
        if len(self._known) > 1000:
            self._known.clear()
        self._known[key_id] = (time.monotonic(), found)
        return found

    def _anonymous(self, connection: HTTPConnection) -> Visitor:
        address = self.hidden(network(connection.client.host if connection.client else ""))
        cookie = self._visitor_of(connection.cookies.get(COOKIE, ""))
        name = f"visitor:{cookie}" if cookie else f"address:{address}"
        owner = f"visitor:{cookie}" if cookie else ""
        if self.trial is None:
            return Visitor(name, (), owner, address)
        accounts = [(f"address:{address}", self.trial * OF_ONE_ADDRESS if cookie else self.trial)]
        if cookie:
            accounts.append((f"visitor:{cookie}", self.trial))
        return Visitor(name, tuple(accounts), owner, address)

    def cookie_for(self, connection: HTTPConnection) -> str | None:
        """A new signed cookie for a browser that has no valid one, else None."""
        if self._visitor_of(connection.cookies.get(COOKIE, "")):
            return None
        name = secrets.token_hex(12)
        return f"{name}.{self.hidden('cookie ' + name)}"

    def _visitor_of(self, cookie: str) -> str | None:
        name, _, signature = cookie.partition(".")
        good = hmac.compare_digest(signature.encode(), self.hidden("cookie " + name).encode())
        return name if name and good else None

    def hidden(self, text: str) -> str:
        """What is kept of a text that must not be known: the same for the same text, and no way back."""
        return hmac.new(self._secret, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:32]

    # --- how much ----------------------------------------------------------------------------------------------------

    async def left(self, visitor: Visitor) -> int | None:
        """How many pictures the visitor may still draw today; None for any number."""
        if self._ledger is None or not visitor.accounts:
            return None
        used = await self.in_pool(self._ledger.used, [account for account, _ in visitor.accounts], _today())
        return max(0, min(daily - used.get(account, 0) for account, daily in visitor.accounts))

    async def check(self, visitor: Visitor, pictures: int) -> None:
        """Raise ApiError (429) when that many would be too many; counts nothing."""
        left = await self.left(visitor)
        if left is not None and left < pictures:
            raise self._over(visitor, left)

    async def spend(self, visitor: Visitor, pictures: int) -> None:
        """Count pictures, all or none, before they are handed out. Raises ApiError (429) when too many."""
        if self._ledger is None or not visitor.accounts:
            return
        if not await self.in_pool(self._ledger.spend, visitor.accounts, pictures, _today()):
            raise self._over(visitor, 0)

    def _over(self, visitor: Visitor, left: int) -> ApiError:
        now = datetime.now(UTC)
        midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
        whose = "This key has" if visitor.name.startswith("key:") else "The free trial has"
        return ApiError(
            429,
            f"{whose} {left} pictures left today; it starts anew at midnight UTC.",
            "insufficient_quota",
            retry_after_s=(midnight - now).total_seconds(),
        )

    async def in_pool(self, call: Callable[..., T], *arguments: Any) -> T:
        """The result of a call made in the database's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def network(address: str) -> str:
    """An address as it is counted: of IPv6 the 64 bits that are one household's."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False).network_address)
    return str(found)
