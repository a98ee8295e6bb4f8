"""Why a node itself starts nothing new."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("nodes", sa.Column("drained", sa.Text(), nullable=False, server_default=""))
