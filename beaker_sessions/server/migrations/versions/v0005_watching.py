"""Output of running sessions for their authors; tokens that stand for one browser."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("watched", sa.DateTime(timezone=True), nullable=True))
    op.add_column("logs", sa.Column("at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("tokens", sa.Column("browser", sa.Boolean(), nullable=False, server_default=sa.false()))
