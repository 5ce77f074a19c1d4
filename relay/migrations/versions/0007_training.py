"""Sample prompts and reports of jobs, and jobs that begin at a tuned model."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("sample_prompts", sa.JSON(), nullable=True))
        jobs.add_column(sa.Column("continue_from", sa.JSON(), nullable=True))
    op.create_table(
        "job_reports",
        sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
    )
    op.create_index("job_reports_by_blob", "job_reports", ["sha256"])
