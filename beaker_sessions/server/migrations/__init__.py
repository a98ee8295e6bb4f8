"""The database's versions, as Alembic's scripts in `versions`. Owns how they are run; each script owns one step."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

HEAD = "0008"  # the newest script, known here so that a start with nothing to do need not load Alembic


def upgrade(engine: sa.Engine) -> None:
    """Bring the database to HEAD; safe when several servers start at once."""
    with engine.connect() as connection:
        found = sa.inspect(connection).has_table("alembic_version")
        if found and connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == HEAD:
            return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
