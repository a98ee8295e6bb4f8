"""Which token a session's own was made with."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("tokens", sa.Column("parent", sa.String(length=26), nullable=True))
