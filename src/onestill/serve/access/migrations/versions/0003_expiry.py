"""Keys that expire."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the time from which a key is refused."""
    op.add_column("keys", sa.Column("expires", sa.String(20)))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("keys", "expires")
