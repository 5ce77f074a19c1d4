"""Relay processes side by side: which there are, and which of them a gpu has dialled in to."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.create_table(
        "relays",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("url", sa.String(500), nullable=True),
        sa.Column("secret", sa.String(64), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
    )
    op.create_table("folders", sa.Column("id", sa.String(40), primary_key=True))
    op.add_column("gpus", sa.Column("relay_id", sa.String(40), nullable=True))
