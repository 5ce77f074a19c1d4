"""Gpu memory that a job was found to need."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("needed_bytes", sa.BigInteger(), nullable=True))
