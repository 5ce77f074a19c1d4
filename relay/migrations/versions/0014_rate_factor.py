"""Jobs whose training diverged go on from their checkpoint with another learning rate."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("rate_factor", sa.Float(), nullable=False, server_default="1"))
