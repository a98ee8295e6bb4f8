"""For which machine an executor's token is: those that registered one are that one's."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("tokens", sa.Column("hostname", sa.Text(), nullable=True))
    op.execute(
        "UPDATE tokens SET hostname = (SELECT hostname FROM nodes WHERE nodes.id = tokens.node_id) "
        "WHERE node_id IS NOT NULL"
    )
