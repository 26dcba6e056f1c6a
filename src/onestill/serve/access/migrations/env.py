"""What Alembic runs: the steps that a database lacks, on the connection that the ledger opened."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], transaction_per_migration=False)
context.run_migrations()
