"""What each key uses in a month, and how much it may."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("month", sa.String(7), primary_key=True),
        sa.Column("user_id", sa.String(40), primary_key=True),
        sa.Column("key_id", sa.String(40), primary_key=True),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=False),
        sa.Column("gpu_s", sa.Float(), nullable=False),
    )
    op.create_index("usage_by_user", "usage", ["user_id", "month"])
    op.add_column("key_rules", sa.Column("tokens_per_month", sa.BigInteger(), nullable=True))
    op.add_column("key_rules", sa.Column("spend_per_month", sa.Float(), nullable=True))
    op.add_column("jobs", sa.Column("key_id", sa.String(40), nullable=True))
