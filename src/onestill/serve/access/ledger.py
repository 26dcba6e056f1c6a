"""Keys and counts, in SQLite in the user's data folder or in PostgreSQL. Needs `[access]`.

A picture is counted before it is handed out, so a crash loses no count. One statement compares and counts, so two
servers on one database cannot both take the last picture of a limit.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from onestill.serve.access.database import Database
from onestill.serve.access.keys import Key, hash_of, new_key
from onestill.serve.errors import Unavailable

__all__ = ["Ledger"]

KEEP_DAYS = 40  # older counts are deleted
NOTE_S = 600.0  # between two notes of the time

_META = sa.MetaData()
_SECRETS = sa.Table("secrets", _META, sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.String))
_KEYS = sa.Table(
    "keys",
    _META,
    sa.Column("id", sa.String, primary_key=True),
    *(sa.Column(name, sa.String) for name in ("name", "hashed", "made", "revoked", "expires")),
    sa.Column("daily", sa.Integer),
)
_COUNTS = sa.Table(
    "counts",
    _META,
    sa.Column("account", sa.String, primary_key=True),
    sa.Column("day", sa.String, primary_key=True),
    sa.Column("pictures", sa.Integer),
)


class Ledger(Database):
    """Keys and counts. Safe to use from many threads and processes at once.

    Args:
        url: see `Database`.
    """

    def __init__(self, url: str | None = None) -> None:
        super().__init__(url)
        self._noted = float("-inf")
        oldest = (datetime.now(UTC) - timedelta(days=KEEP_DAYS)).date().isoformat()
        with contextlib.suppress(Unavailable):  # a later start deletes them
            self.delete(sa.delete(_COUNTS).where(_COUNTS.c.day < oldest))

    # --- keys --------------------------------------------------------------------------------------------------------

    def add_key(self, name: str, daily: int | None, expires: str | None = None) -> tuple[str, str]:
        """Make a key; returns its id and the key itself, which is not stored. `expires` is as in `Key`."""
        key_id, key = new_key()
        row = {"id": key_id, "name": name, "hashed": hash_of(key), "daily": daily, "made": _today(), "expires": expires}
        with self.begin() as connection:
            connection.execute(sa.insert(_KEYS).values(row))
        return key_id, key

    def find_key(self, key_id: str) -> Key | None:
        """The key of this id, None where there is none or it is revoked."""
        with self.begin() as connection:
            row = connection.execute(
                sa.select(_KEYS).where(_KEYS.c.id == key_id, _KEYS.c.revoked.is_(None))
            ).one_or_none()
        return None if row is None else Key(row.id, row.name, row.hashed, row.daily, row.expires)

    def revoke_key(self, key_id: str) -> bool:
        """Revoke a key; False where there is no valid one of this id."""
        valid = sa.and_(_KEYS.c.id == key_id, _KEYS.c.revoked.is_(None))
        return self.delete(sa.update(_KEYS).where(valid).values(revoked=_today())) == 1

    def list_keys(self) -> list[dict[str, Any]]:
        """Every key ever made: id, name, daily, made, revoked, expires, and `today`, the pictures it drew today."""
        used = sa.func.coalesce(_COUNTS.c.pictures, 0).label("today")
        counted = _KEYS.outerjoin(
            _COUNTS, sa.and_(_COUNTS.c.account == sa.literal("key:") + _KEYS.c.id, _COUNTS.c.day == _today())
        )
        wanted = [_KEYS.c[name] for name in ("id", "name", "daily", "made", "revoked", "expires")]
        with self.begin() as connection:
            rows = connection.execute(sa.select(*wanted, used).select_from(counted).order_by(_KEYS.c.made, _KEYS.c.id))
            return [dict(row._mapping) for row in rows]

    # --- counts ------------------------------------------------------------------------------------------------------

    def used(self, accounts: Sequence[str], day: str) -> dict[str, int]:
        """Pictures of each account on a day, as `2026-11-24`; those without any are left out."""
        with self.begin() as connection:
            rows = connection.execute(
                sa.select(_COUNTS.c.account, _COUNTS.c.pictures).where(
                    _COUNTS.c.day == day, _COUNTS.c.account.in_(accounts)
                )
            )
            return {account: pictures for account, pictures in rows}

    def spend(self, accounts: Sequence[tuple[str, int]], pictures: int, day: str) -> bool:
        """Count pictures on every account, or on none when one of them would pass its daily limit.

        Args:
            accounts: (account, pictures a day).
            pictures: how many.
            day: as `2026-11-24`.

        Returns:
            Whether they were counted.
        """
        insert = sqlite.insert if self.is_sqlite else postgresql.insert
        with self.begin() as connection:
            # In one order everywhere, so that two transactions cannot wait for each other.
            for account, daily in sorted(accounts):
                new = insert(_COUNTS).values(account=account, day=day, pictures=pictures)
                total = _COUNTS.c.pictures + pictures
                statement = new.on_conflict_do_update(
                    index_elements=["account", "day"], set_={"pictures": total}, where=total <= daily
                )
                counted = statement.returning(_COUNTS.c.pictures)
                if pictures > daily or connection.execute(counted).first() is None:
                    connection.rollback()
                    return False
        return True

    def secret(self) -> bytes:
        """The random secret that signs cookies, the same for every server on this database."""
        insert = sqlite.insert if self.is_sqlite else postgresql.insert
        mine = insert(_SECRETS).values(name="cookies", value=secrets.token_hex(32)).on_conflict_do_nothing()
        with self.begin() as connection:
            connection.execute(mine)
            return bytes.fromhex(
                connection.execute(sa.select(_SECRETS.c.value).where(_SECRETS.c.name == "cookies")).scalar_one()
            )

    # --- the time ----------------------------------------------------------------------------------------------------

    def last_time(self) -> float | None:
        """The last time that was noted, in seconds since 1970; None where there is none."""
        with self.begin() as connection:
            value = connection.execute(
                sa.select(_SECRETS.c.value).where(_SECRETS.c.name == "time")
            ).scalar_one_or_none()
        return None if value is None else float(value)

    def note_time(self, now: float) -> None:
        """Note the time, at most every ten minutes: a later start compares its clock. A failure is no error."""
        if time.monotonic() - self._noted < NOTE_S:
            return
        insert = sqlite.insert if self.is_sqlite else postgresql.insert
        noted = insert(_SECRETS).values(name="time", value=str(now))
        with contextlib.suppress(Unavailable), self.begin() as connection:
            connection.execute(noted.on_conflict_do_update(index_elements=["name"], set_={"value": str(now)}))
            self._noted = time.monotonic()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
