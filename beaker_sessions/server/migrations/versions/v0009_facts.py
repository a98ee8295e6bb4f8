"""Facts about the database itself. Its epoch says to executors which one it is."""

import sqlalchemy as sa
from alembic import op

from beaker_sessions import ids

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    facts = op.create_table(
        "facts",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("value", sa.Text(), nullable=False),
    )
    op.bulk_insert(facts, [{"name": "epoch", "value": ids.ulid()}])
