"""Jobs that answer the rows of a file."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0016"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("kind", sa.String(12), nullable=False, server_default="fine-tune"))
    op.create_table(
        "batches",
        sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("endpoint", sa.String(40), nullable=False),
        sa.Column("model", sa.String(400), nullable=False),
        sa.Column("completion_window", sa.String(10), nullable=False),
        sa.Column("metadata", sa.JSON()),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("completed", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("done", sa.JSON(), nullable=False),
        sa.Column("in_progress_at", sa.Float()),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("expired", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("files_at", sa.Float()),
        sa.Column("output_file", sa.String(40)),
        sa.Column("error_file", sa.String(40)),
    )
    op.create_index("batches_without_files", "batches", ["files_at", "expires_at"])
    op.create_table(
        "batch_parts",
        sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
    )
