"""The pictures that visitors publish, in the database of keys and counts. Needs `[access]`.

A picture is one row with its file in it. So it is there whole or not at all, even after a crash, and all servers on one
database show the same. The owner is stored as a keyed hash, and the prompt only where the owner lets it be shown.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from onestill.serve.access.ledger import Ledger
from onestill.serve.errors import ApiError
from onestill.serve.gallery.clock import SteadyClock

__all__ = ["Entry", "Gallery", "Rules"]

EACH_ADDRESS = 4  # times the pictures of one owner, as a few visitors may share an address
DAY_MS = 24 * 3600 * 1000
AT_ONCE = 4  # expired pictures: that many are deleted also where the disk is full
ADD_LOCK = 0x6F6E6574  # PostgreSQL's advisory lock while a picture is added: any fixed number

_TABLE = sa.Table(
    "gallery",
    sa.MetaData(),
    sa.Column("id", sa.String, primary_key=True),
    *(sa.Column(name, sa.BigInteger) for name in ("made_ms", "expires_ms", "seed")),
    *(sa.Column(name, sa.String) for name in ("owner", "address", "prompt")),
    *(sa.Column(name, sa.Integer) for name in ("num_inference_steps", "width", "height", "size")),
    sa.Column("file", sa.LargeBinary),
)
_ENTRY_COLUMNS = [column for column in _TABLE.c if column.name not in ("address", "size", "file")]


@dataclass(frozen=True)
class Rules:
    """The limits of a gallery.

    Attributes:
        days: how long a picture stays.
        most, each: pictures in all, and of one owner; of one address four times as many.
        most_bytes, file_bytes: of all files, and of one.
        saves_a_minute: additions and deletions by one owner.
        looks_a_second: lists and files read by one owner.
    """

    days: int = 30
    most: int = 1000
    each: int = 20
    most_bytes: int = 128 * 2**20
    file_bytes: int = 2**20
    saves_a_minute: float = 10.0
    looks_a_second: float = 20.0


@dataclass(frozen=True)
class Entry:
    """A picture without its file. `owner` is a keyed hash; `prompt` is None where it must not be shown."""

    id: str
    made_ms: int
    expires_ms: int
    seed: int
    owner: str
    prompt: str | None
    num_inference_steps: int
    width: int
    height: int


class Gallery:
    """The pictures. Safe to use from any thread, and from many processes at once.

    Args:
        ledger: whose database they are in.
        rules: its limits.
        clock: seconds since 1970; None is the system's clock, whose jumps delete nothing.
    """

    def __init__(self, ledger: Ledger, rules: Rules | None = None, clock: Callable[[], float] | None = None) -> None:
        self.rules = rules or Rules()
        self._ledger = ledger
        steady = SteadyClock(ledger.last_time())
        self._clock, self._sure = (steady, steady.sure) if clock is None else (clock, clock)

    def check_room(self, owner: str, address: str, size: int = 0) -> None:
        """Raise ApiError where `size` bytes have no room: 429, the gallery is full; 400, the file is too large."""
        self._check_size(size)
        with self._ledger.begin() as connection:
            self._check_room(connection, owner, address, size)

    def add(
        self,
        file: bytes,
        *,
        name: str | None = None,
        owner: str,
        address: str,
        prompt: str | None,
        seed: int,
        num_inference_steps: int,
        width: int,
        height: int,
    ) -> Entry:
        """Add a picture, and delete those that have expired.

        Args:
            file: a WebP.
            name: its id, 32 random hexadecimal digits; None makes one.
            owner, address: as `Access.keyed_hash` makes them.
            prompt: None where it must not be shown; then it is not stored.

        Raises:
            ApiError: 429, there is no room; 400, the file is too large.
        """
        self._check_size(len(file))
        now = self._now()
        expires = now + self.rules.days * DAY_MS
        name = name or secrets.token_hex(16)
        prompt = prompt and prompt.replace("\0", " ")  # PostgreSQL cannot store NUL in a text
        entry = Entry(name, now, expires, seed, owner, prompt, num_inference_steps, width, height)
        self.forget_expired()
        with self._ledger.begin() as connection:
            if not self._ledger.is_sqlite:  # SQLite has one writer at a time anyway
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADD_LOCK)))
            self._check_room(connection, owner, address, len(file))
            row = {**vars(entry), "address": address, "size": len(file), "file": file}
            connection.execute(sa.insert(_TABLE).values(row))
        return entry

    def page(self, most: int, before: tuple[int, str] | None = None) -> list[Entry]:
        """Up to `most` pictures, newest first, after the one whose (made_ms, id) is `before`."""
        query = sa.select(*_ENTRY_COLUMNS).where(_TABLE.c.expires_ms > self._now())
        if before is not None:
            query = query.where(sa.tuple_(_TABLE.c.made_ms, _TABLE.c.id) < sa.tuple_(*map(sa.literal, before)))
        query = query.order_by(_TABLE.c.made_ms.desc(), _TABLE.c.id.desc()).limit(most)
        with self._ledger.begin() as connection:
            return [Entry(**row) for row in connection.execute(query).mappings()]

    def find(self, name: str) -> Entry | None:
        """The picture of this id, None where there is none."""
        query = sa.select(*_ENTRY_COLUMNS).where(_TABLE.c.id == name, _TABLE.c.expires_ms > self._now())
        with self._ledger.begin() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else Entry(**row)

    def file(self, name: str) -> bytes | None:
        """The bytes of a picture's file, None where there is none."""
        query = sa.select(_TABLE.c.file).where(_TABLE.c.id == name, _TABLE.c.expires_ms > self._now())
        with self._ledger.begin() as connection:
            found = connection.execute(query).scalar_one_or_none()
        return None if found is None else bytes(found)

    def remove(self, name: str) -> bool:
        """Delete a picture for good; False where there is none. The caller checks who may."""
        return bool(self._ledger.delete(sa.delete(_TABLE).where(_TABLE.c.id == name)))

    def forget_expired(self) -> int:
        """Delete expired pictures for good; returns how many there were."""
        sure = self._sure()
        self._ledger.note_time(sure)
        expired = sa.select(_TABLE.c.id).where(_TABLE.c.expires_ms <= int(sure * 1000)).limit(AT_ONCE)
        total = 0
        while gone := self._ledger.delete(sa.delete(_TABLE).where(_TABLE.c.id.in_(expired))):
            total += gone
        return total

    def _check_size(self, size: int) -> None:
        if size > self.rules.file_bytes:
            raise ApiError(400, "This picture is too large for the gallery; take a smaller size.", "too_large")

    def _check_room(self, connection: sa.Connection, owner: str, address: str, size: int) -> None:
        rules, alive = self.rules, _TABLE.c.expires_ms > self._now()
        mine, here, total, used = connection.execute(
            sa.select(
                _count(_TABLE.c.owner == owner),
                _count(_TABLE.c.address == address),
                sa.func.count(),
                sa.func.coalesce(sa.func.sum(_TABLE.c.size), 0),
            ).where(alive)
        ).one()
        if mine >= rules.each or (address and here >= EACH_ADDRESS * rules.each):
            raise ApiError(
                429, "Your part of the gallery is full; delete one of your pictures first.", "gallery_share_full"
            )
        if total >= rules.most or used + size > rules.most_bytes:
            raise ApiError(
                429, "The gallery is full; there is room again as pictures expire.", "gallery_full", retry_after_s=3600
            )

    def _now(self) -> int:
        return int(self._clock() * 1000)


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(sa.case((condition, 1), else_=0)), 0)
