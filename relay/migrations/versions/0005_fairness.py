"""Gpu seconds are shared between users; gpus that drain."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    with op.batch_alter_table("users") as users:
        users.add_column(sa.Column("credit_s", sa.Float(), nullable=False, server_default="0"))
        users.add_column(sa.Column("served_at", sa.Float(), nullable=False, server_default="0"))
    with op.batch_alter_table("gpus") as gpus:
        gpus.add_column(sa.Column("draining", sa.Boolean(), nullable=False, server_default=sa.false()))
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("leased_at", sa.Float(), nullable=True))
    op.create_index("jobs_by_turn", "jobs", ["status", "base_model", "owner", "created_at"])
