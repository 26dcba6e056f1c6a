"""The database of keys and counts: SQLite in the user's data folder, or PostgreSQL by URL. Needs `[access]`.

A picture is counted before it is handed out, so a crash loses no count. One statement compares and counts, so two
servers on one database cannot both take the last picture of a limit.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from onestill.errors import OnestillError, require
from onestill.serve.access.keys import Key, hash_of, new_key
from onestill.serve.errors import Unavailable

__all__ = ["Ledger", "default_url"]

KEEP_DAYS = 40  # older counts are deleted
MIGRATION_LOCK = 0x6F6E6573  # PostgreSQL's advisory lock while tables are made: any fixed number

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


def default_url() -> str:
    """The URL of a SQLite file in the user's data folder, which is made if need be."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    folder = Path(base) / "onestill"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OnestillError(f"'{folder}' cannot be made ({error.strerror}); give a --database.") from error
    return f"sqlite:///{folder / 'serve.db'}"


class Ledger:
    """Keys and counts. Safe to use from many threads and processes at once.

    Args:
        url: for SQLAlchemy: `sqlite:///file.db` or `postgresql://user@host/name`; None is `default_url`.

    Raises:
        OnestillError: there is no such database, or it cannot be used.
    """

    def __init__(self, url: str | None = None) -> None:
        try:
            found = make_url(url or default_url())
        except ArgumentError as error:
            raise OnestillError(
                "The --database is not understood; write sqlite:///FILE or postgresql://USER@HOST/NAME."
            ) from error
        if found.drivername in ("postgresql", "postgres"):
            found = found.set(drivername="postgresql+psycopg")
        if found.drivername.startswith("postgresql"):
            require("psycopg", "postgres")
        elif not found.drivername.startswith("sqlite"):
            raise OnestillError(f"'{found.drivername}' is not supported; use sqlite or postgresql.")
        self.is_sqlite = found.drivername.startswith("sqlite")
        options: dict[str, Any] = {} if self.is_sqlite else {"pool_pre_ping": True}
        self._engine = sa.create_engine(found, **options)
        if self.is_sqlite:
            _prepare_sqlite(self._engine)
        try:
            self._migrate()
            with self._engine.begin() as connection:
                oldest = (datetime.now(UTC) - timedelta(days=KEEP_DAYS)).date().isoformat()
                connection.execute(sa.delete(_COUNTS).where(_COUNTS.c.day < oldest))
        except CommandError as error:
            raise OnestillError("The database was made by a newer onestill; update this one.") from error
        except (SQLAlchemyError, OSError) as error:
            reason = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
            raise OnestillError(f"The database cannot be used ({reason}); check --database.") from error
        if self.is_sqlite and found.database:
            with contextlib.suppress(OSError):
                os.chmod(found.database, 0o600)  # it holds the secret that signs cookies

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

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
        with self.begin() as connection:
            found = connection.execute(
                sa.update(_KEYS).where(_KEYS.c.id == key_id, _KEYS.c.revoked.is_(None)).values(revoked=_today())
            )
        return found.rowcount == 1

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

    # --- the database ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction. Raises Unavailable when the database does not answer."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise Unavailable("The database does not answer at present; try again in a moment.", 5) from error

    def wipe(self) -> None:
        """Remove deleted rows from SQLite's log too. PostgreSQL's autovacuum does that by itself."""
        if not self.is_sqlite:
            return
        connection = self._engine.raw_connection()  # outside a transaction
        try:
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
        finally:
            connection.close()

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        with self._engine.begin() as connection:
            if not self.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _prepare_sqlite(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        # Python's own transactions take the lock too late for two processes; see "begin" below.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "secure_delete=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
