"""Training files may be pictures, with captions or without, and then a job may carry a concept."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    with op.batch_alter_table("files") as files:
        files.add_column(sa.Column("kind", sa.String(12), nullable=False, server_default="text"))
        files.add_column(sa.Column("captioned", sa.Integer(), nullable=True))
        files.add_column(sa.Column("report", sa.JSON(), nullable=True))
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("concept", sa.JSON(), nullable=True))
