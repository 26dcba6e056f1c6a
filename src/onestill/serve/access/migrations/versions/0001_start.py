"""Secrets, keys and counts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.String(128), nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(8), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("hashed", sa.String(64), nullable=False),
        sa.Column("daily", sa.Integer),
        sa.Column("made", sa.String(10), nullable=False),
        sa.Column("revoked", sa.String(10)),
    )
    op.create_table(
        "counts",
        sa.Column("account", sa.String(80), primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("pictures", sa.Integer, nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    for name in ("counts", "keys", "secrets"):
        op.drop_table(name)
