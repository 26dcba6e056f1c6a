"""Pictures that visitors chose to show."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "gallery",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("made_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.String(32), nullable=False),
        sa.Column("address", sa.String(32), nullable=False),
        sa.Column("prompt", sa.Text),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("num_inference_steps", sa.Integer, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("file", sa.LargeBinary, nullable=False),
    )
    op.create_index("gallery_newest", "gallery", ["made_ms", "id"])
    op.create_index("gallery_expires", "gallery", ["expires_ms"])


def downgrade() -> None:
    """Drop it."""
    op.drop_table("gallery")
