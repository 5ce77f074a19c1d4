"""A tuned model may come from outside: without a job."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    with op.batch_alter_table("models") as models:
        models.alter_column("job_id", existing_type=sa.String(length=40), nullable=True)
