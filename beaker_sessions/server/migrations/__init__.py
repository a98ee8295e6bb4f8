"""The database's versions, as Alembic's scripts in `versions`. Owns how they are run; each script owns one step."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from ... import __version__
from ...errors import Error

HEAD = "0009"  # the newest script, known here so that a start with nothing to do need not load Alembic

EMPTY = "restore a backup: beaker-server restore FILE; to begin without any accounts and sessions, remove server.made"


def upgrade(engine: sa.Engine, *, new: bool = True) -> None:
    """Bring the database to HEAD; safe when several servers start at once.

    new: whether it may be empty. Raises Error unavailable for an empty one, or one of a newer version.
    """
    with engine.connect() as connection:
        found = None
        if sa.inspect(connection).has_table("alembic_version"):
            found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    if found == HEAD:
        return
    if found is None and not new:
        raise Error("unavailable", "the database is empty, and there was one", EMPTY)
    if found is not None and not "0001" <= found < HEAD:
        what = f"the database is of version {found}, and this is beaker-server {__version__}, which knows {HEAD}"
        raise Error("unavailable", what, "start the newer beaker-server, or restore a backup made before the upgrade")
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
