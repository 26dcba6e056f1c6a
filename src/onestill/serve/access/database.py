"""The database behind keys, counts and the gallery, and what it does when it is locked or its disk is full.

A lock of another program is waited for by one request a second; the others are refused at once. A full disk refuses all
but deletions: a spare file beside SQLite's own leaves them room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from onestill.checkpoint import home
from onestill.errors import OnestillError, require
from onestill.serve.errors import Unavailable

__all__ = ["Database", "default_url"]

LOG = logging.getLogger("onestill.serve")
STARTING_MS, BUSY_MS = 10_000, 1000  # how long a lock is waited for: at the start, and by a request
BREAK_S = 1.0  # after a lock that did not go away, every request is refused at once for so long
SPARE = 8 * 2**20  # bytes kept beside a SQLite file; a full disk leaves them to deletions
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
MIGRATION_LOCK = 0x6F6E6573  # PostgreSQL's advisory lock while tables are made: any fixed number


def default_url() -> str:
    """The URL of a SQLite file in the user's data folder, which is made if need be."""
    base = os.environ.get("XDG_DATA_HOME") or home() / ".local" / "share"
    folder = Path(base) / "onestill"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OnestillError(f"'{folder}' cannot be made ({error.strerror}); give a --database.") from error
    return f"sqlite:///{folder / 'serve.db'}"


class Database:
    """Tables in SQLite or PostgreSQL, made or updated by the migrations. Safe to use from many threads and processes.

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
        is_file = self.is_sqlite and found.database not in (None, "", ":memory:")
        self._spare = Path(f"{found.database}-spare") if is_file else None
        self._wait_ms = STARTING_MS
        self._down_until = float("-inf")
        self._engine = self._connected(found)
        try:
            self._open()
        except CommandError as error:
            raise OnestillError("The database was made by a newer onestill; update this one.") from error
        except (SQLAlchemyError, OSError) as error:
            raise OnestillError(f"The database cannot be used ({_reason(error)}); check --database.") from error
        if self.is_sqlite and found.database:
            with contextlib.suppress(OSError):
                os.chmod(found.database, 0o600)  # it holds the secret that signs cookies
        self._keep_spare()
        self._wait_ms = BUSY_MS

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction.

        Raises:
            Unavailable: the database does not answer, is locked by another program, or its disk is full. While it is
                locked, only one call a second waits for it.
        """
        if time.monotonic() < self._down_until:
            raise Unavailable("The database does not answer at present; try again in a moment.", 5)
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise self._unavailable(error) from error
        if self._down_until > 0:
            self._down_until = float("-inf")
            LOG.warning("The database answers again.")

    def _unavailable(self, error: SQLAlchemyError) -> Unavailable:
        if _is(error, FULL):
            LOG.error("The disk of the database is full.")
            return DiskFull("The server's disk is full: deleting works, and all else once there is room.", 60)
        if _is(error, LOCKED) or (isinstance(error, OperationalError) and not self.is_sqlite):
            if self._down_until < 0:
                LOG.error("The database does not answer (%s).", _reason(error))
            self._down_until = time.monotonic() + BREAK_S
        return Unavailable("The database does not answer at present; try again in a moment.", 5)

    def check(self) -> None:
        """Raise Unavailable where nothing could be written at present for another program's lock."""
        with self.begin():
            pass

    def delete(self, statement: sa.Delete | sa.Update) -> int:
        """Execute a statement that takes something away, also where the disk is full; returns how many rows it found.

        The rows that it deletes are removed from SQLite's log too. PostgreSQL's autovacuum does that by itself.
        """
        try:
            gone = self._execute(statement)
        except DiskFull:
            if not self._drop_spare():
                raise
            gone = self._execute(statement)
        if gone and self.is_sqlite:
            self._wipe()
        self._keep_spare()
        return gone

    def _execute(self, statement: sa.Delete | sa.Update) -> int:
        with self.begin() as connection:
            return connection.execute(statement).rowcount

    def _wipe(self) -> None:
        connection = self._engine.raw_connection()  # outside a transaction
        try:
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
        except sqlite3.Error as error:  # the rows are gone; the next deletion wipes the log
            LOG.error("The database's log cannot be shortened (%s).", error)
        finally:
            connection.close()

    def _keep_spare(self) -> None:
        if self._spare is not None and not self._spare.exists():
            try:
                self._spare.write_bytes(os.urandom(SPARE))  # random, so that no file system stores it in less
            except OSError as error:
                LOG.error("No room can be kept for deletions beside the database (%s).", error.strerror)
                self._drop_spare()

    def _drop_spare(self) -> bool:
        with contextlib.suppress(OSError):
            if self._spare is not None:
                self._spare.unlink()
                return True
        return False

    def _open(self) -> None:
        """Make or update the tables. A full disk leaves its spare room to that."""
        try:
            self._migrate()
        except SQLAlchemyError as error:
            if not _is(error, FULL) or not self._drop_spare():
                raise
            self._open()

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        with self._engine.begin() as connection:
            if not self.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _connected(self, url: sa.URL) -> sa.Engine:
        if not self.is_sqlite:
            bounds = {"connect_timeout": 3, "tcp_user_timeout": 5000}  # s, ms
            few = {name: value for name, value in bounds.items() if name not in url.query}
            engine = sa.create_engine(url, pool_pre_ping=True, connect_args=few)
        else:
            engine = sa.create_engine(url)

            @sa.event.listens_for(engine, "connect")
            def connect(connection: Any, record: Any) -> None:
                # Python's own transactions take the lock too late for two processes; see "begin" below.
                connection.isolation_level = None
                for pragma in (
                    f"busy_timeout={STARTING_MS}",
                    "journal_mode=WAL",
                    "synchronous=NORMAL",
                    "secure_delete=ON",
                ):
                    connection.execute(f"PRAGMA {pragma}").close()

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            if self.is_sqlite:
                connection.exec_driver_sql(f"PRAGMA busy_timeout={self._wait_ms}")
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {self._wait_ms}")

        return engine


class DiskFull(Unavailable):
    """The database's disk is full."""


def _is(error: SQLAlchemyError, codes: Sequence[int]) -> bool:
    """Whether SQLite raised an error of one of these codes, the family of a code included."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0)
    return code in codes or code & 0xFF in codes


def _reason(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().split("\n")[0]
