"""Checkpoints, and jobs that pause and go on."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("saved_step", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("lost_step", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("pause_asked_at", sa.Float(), nullable=True))
        jobs.add_column(sa.Column("reserved_bytes", sa.BigInteger(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("estimated_s", sa.Float(), nullable=True))
    op.create_table(
        "checkpoints",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("validation_loss", sa.Float(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"]),
        sa.PrimaryKeyConstraint("job_id", "step"),
    )
    op.create_table(
        "checkpoint_chunks",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["job_id", "step"], ["checkpoints.job_id", "checkpoints.step"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "step", "sha256"),
    )
    op.create_index("checkpoint_chunks_by_blob", "checkpoint_chunks", ["sha256"])
