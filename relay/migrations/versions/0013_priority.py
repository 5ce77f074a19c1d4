"""A user's jobs have an order of their own."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("behind", sa.Integer(), nullable=False, server_default="0"))
    op.drop_index("jobs_by_turn", "jobs")
    op.create_index("jobs_by_turn", "jobs", ["status", "base_model", "owner", "behind", "created_at"])
