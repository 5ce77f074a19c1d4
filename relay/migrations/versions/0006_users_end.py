"""Users may be disabled, and are marked before they are deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("users", sa.Column("disabled_at", sa.Float(), nullable=True))
    op.add_column("users", sa.Column("deleting_at", sa.Float(), nullable=True))
