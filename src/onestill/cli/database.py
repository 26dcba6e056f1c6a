"""Opening the database of keys, counts and the gallery, for the commands that need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onestill.errors import require

if TYPE_CHECKING:
    from onestill.serve.access.ledger import Ledger


def open_ledger(database: str | None) -> Ledger:
    """The ledger at a database's URL; None is SQLite in the user's data folder. Needs the extra `access`."""
    require("sqlalchemy", "access")
    require("alembic", "access")
    from onestill.serve.access.ledger import Ledger

    return Ledger(database)
